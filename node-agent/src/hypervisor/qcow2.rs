//! The few fields of a qcow2 header that a chain is made of, read without QEMU.
//!
//! The header of an image that a guest can't write was written by QEMU; it is still read as hostile input: a fixed
//! prefix, and a backing name of at most 1023 bytes, which is the format's own limit.

use std::io::{Read, Seek, SeekFrom};

const MAGIC: [u8; 4] = *b"QFI\xfb";
const LONGEST_NAME: u32 = 1023;
/// Longest first table, in entries: QEMU's own limit.
const MOST_ENTRIES: u64 = (32 << 20) / 8;

/// What a header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Virtual size, in bytes.
    pub virtual_size: u64,
    /// The backing string as it stands there; relative to the image's directory unless absolute.
    pub backing: Option<String>,
    /// Whether QEMU needs a key to work on the image.
    pub encrypted: bool,
}

/// Why a header can't be read.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// Not a qcow2 image.
    #[error("not a qcow2 image")]
    NotQcow2,
    /// The backing string is longer than the format allows, or not text.
    #[error("the backing string is malformed")]
    BadBacking,
    /// The image has a parent that can't be looked up.
    #[error("the image has a parent, and that of a VMDK image isn't looked up")]
    Parent,
    /// The backing string may lead to any file.
    #[error("the image may lie on any other: it says that its backing image is {0}")]
    UnclearBacking(String),
    /// The file couldn't be read.
    #[error("failed to read the image's header")]
    Io(#[from] std::io::Error),
}

/// The beginning of an image, which says what it is.
fn read_prefix<const LENGTH: usize>(image: &mut (impl Read + Seek)) -> Result<[u8; LENGTH], HeaderError> {
    let mut prefix = [0; LENGTH];
    image.seek(SeekFrom::Start(0))?;
    image.read_exact(&mut prefix).map_err(short_is_not_qcow2)?;
    if prefix[..4] == MAGIC { Ok(prefix) } else { Err(HeaderError::NotQcow2) }
}

/// Reads the header of an image.
pub fn read_header(image: &mut (impl Read + Seek)) -> Result<Header, HeaderError> {
    let prefix: [u8; 36] = read_prefix(image)?;
    let length = be32(&prefix[16..20]);
    let backing = if length == 0 { None } else { Some(read_backing(image, be64(&prefix[8..16]), length)?) };
    Ok(Header { virtual_size: be64(&prefix[24..32]), backing, encrypted: be32(&prefix[32..36]) != 0 })
}

/// Whether an image has its data in another file (bit 2 of the incompatible features, from version 3 on).
pub fn has_external_data(image: &mut (impl Read + Seek)) -> Result<bool, HeaderError> {
    let prefix: [u8; 80] = read_prefix(image)?;
    Ok(be32(&prefix[4..8]) >= 3 && be64(&prefix[72..80]) & (1 << 2) != 0)
}

/// Whether an image has anything of its own: an entry in its table of tables.
pub fn has_clusters(image: &mut (impl Read + Seek)) -> Result<bool, HeaderError> {
    let prefix: [u8; 48] = read_prefix(image)?;
    let entries = u64::from(be32(&prefix[36..40])).min(MOST_ENTRIES);
    image.seek(SeekFrom::Start(be64(&prefix[40..48])))?;
    let mut table = vec![];
    image.take(entries * 8).read_to_end(&mut table)?;
    Ok(table.iter().any(|byte| *byte != 0))
}

/// Reads a backing string of `length` bytes at `offset`.
pub(super) fn read_backing(image: &mut (impl Read + Seek), offset: u64, length: u32) -> Result<String, HeaderError> {
    if length > LONGEST_NAME {
        return Err(HeaderError::BadBacking);
    }
    let mut name = vec![0; length as usize];
    image.seek(SeekFrom::Start(offset))?;
    image.read_exact(&mut name).map_err(|_| HeaderError::BadBacking)?;
    String::from_utf8(name).map_err(|_| HeaderError::BadBacking)
}

fn short_is_not_qcow2(error: std::io::Error) -> HeaderError {
    if error.kind() == std::io::ErrorKind::UnexpectedEof { HeaderError::NotQcow2 } else { HeaderError::Io(error) }
}

fn be32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn be64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn image(backing: &[u8], claimed: u32) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(3_u32.to_be_bytes());
        bytes.extend(200_u64.to_be_bytes());
        bytes.extend(claimed.to_be_bytes());
        bytes.extend(16_u32.to_be_bytes());
        bytes.extend(1_048_576_u64.to_be_bytes());
        bytes.resize(200, 0);
        bytes.extend(backing);
        bytes
    }

    #[test]
    fn a_header_gives_size_and_backing() {
        let found = read_header(&mut Cursor::new(image(b"disk.qcow2", 10))).unwrap();
        assert_eq!(found, Header { virtual_size: 1_048_576, backing: Some("disk.qcow2".into()), encrypted: false });
        assert_eq!(read_header(&mut Cursor::new(image(b"", 0))).unwrap().backing, None);
    }

    #[test]
    fn an_image_has_clusters_once_something_was_written_to_it() {
        let here = tempfile::tempdir().unwrap();
        let path = here.path().join("disk.qcow2");
        let run = |program: &str, arguments: &[&str]| {
            assert!(std::process::Command::new(program).args(arguments).arg(&path).status().unwrap().success());
        };
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "size=4G"]);
        let has = || has_clusters(&mut std::fs::File::open(&path).unwrap()).unwrap();
        assert!(!has());
        run("qemu-io", &["-f", "qcow2", "-c", "write -q 3G 64k"]);
        assert!(has());
        assert!(matches!(has_clusters(&mut Cursor::new(vec![0; 4096])), Err(HeaderError::NotQcow2)));
    }

    #[test]
    fn a_hostile_header_is_refused() {
        for bytes in [image(b"x", u32::MAX), image(b"x", 500), image(b"\xff\xfe", 2)] {
            assert!(matches!(read_header(&mut Cursor::new(bytes)), Err(HeaderError::BadBacking)));
        }
        for bytes in [vec![], b"QFI\xfb".to_vec(), vec![0; 4096]] {
            assert!(matches!(read_header(&mut Cursor::new(bytes)), Err(HeaderError::NotQcow2)));
        }
    }
}
