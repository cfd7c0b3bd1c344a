//! A guest that writes to two disks by turns, and needs nothing but a BIOS.

use std::path::Path;

use crate::content::qemu_io;

/// Where the guest writes: the ninth sector.
pub const COUNTER: usize = 8 * 512;

/// A guest of 64 bytes: it counts up in memory and writes the counter's sector to the first disk, then to the second,
/// one after the other, for ever, through the BIOS. Whatever is cut at one instant has A − B = 0 or 1.
#[rustfmt::skip]
const GUEST: [u8; 64] = [
    0xFA,                                                 //       cli
    0x31, 0xC0, 0x8E, 0xD8, 0x8E, 0xC0, 0x8E, 0xD0,       //       ax, ds, es, ss = 0
    0xBC, 0x00, 0x7C, 0xFB,                               //       sp = 0x7c00; sti
    0x66, 0xC7, 0x06, 0x00, 0x80, 0, 0, 0, 0,             //       dword [0x8000] = 0
    0x66, 0xFF, 0x06, 0x00, 0x80,                         // next: inc dword [0x8000]
    0xB2, 0x80, 0xE8, 0x07, 0x00,                         //       dl = first disk; call write
    0xB2, 0x81, 0xE8, 0x02, 0x00,                         //       dl = second disk; call write
    0xEB, 0xEF,                                           //       jmp next
    0xBE, 0x30, 0x7C, 0xB8, 0x00, 0x43, 0xCD, 0x13, 0xC3, // write: si = packet; ax = 0x4300; int 0x13; ret
    0x10, 0, 1, 0, 0x00, 0x80, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, // packet: one sector from 0:0x8000 to sector 8
];

/// The guest's boot sector, on its first disk.
pub fn install(image: &Path, format: &str) {
    let mut sector = [0; 512];
    sector[..GUEST.len()].copy_from_slice(&GUEST);
    sector[510..].copy_from_slice(&[0x55, 0xAA]);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("sector");
    std::fs::write(&file, sector).unwrap();
    let write = format!("write -s {} 0 512", file.display());
    qemu_io(image, format, &[], &[write]).unwrap();
}
