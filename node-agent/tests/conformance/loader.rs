//! A boot loader: what a disk needs to boot, and no guest.

/// Reads 127 sectors by the BIOS, twice, writes them back, waits, and resets: what a boot loader does, in short.
const LOADER: &[u8] = &[
    0x31, 0xc0, 0x8e, 0xd8, // ds = 0
    0xbe, 0x40, 0x7c, // si = packet
    0xb9, 0x02, 0x00, // cx = 2
    0xb4, 0x42, 0xcd, 0x13, // read
    0xe2, 0xfa, // again
    0xb4, 0x43, 0xb0, 0x00, 0xcd, 0x13, // write
    0xb4, 0x86, 0xb9, 0x2d, 0x00, 0xba, 0xc0, 0xc6, 0xcd, 0x15, // wait for three seconds
    0xea, 0x00, 0x00, 0xff, 0xff, // reset
];

/// The boot sector of such a disk.
pub fn sector() -> Vec<u8> {
    let mut sector = vec![0; 512];
    sector[..LOADER.len()].copy_from_slice(LOADER);
    // 127 sectors from sector 1 to 0x10000.
    sector[0x40..0x50].copy_from_slice(&[0x10, 0, 127, 0, 0, 0, 0x00, 0x10, 1, 0, 0, 0, 0, 0, 0, 0]);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}
