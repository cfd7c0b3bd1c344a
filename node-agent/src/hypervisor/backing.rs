//! What an image says it backs onto, whatever its format: read from its header, without QEMU, as hostile input.

use std::io::{Read, Seek, SeekFrom};

use super::qcow2::{self, HeaderError};

/// First bytes of a QED image.
const QED: [u8; 4] = *b"QED\0";
/// The bit of a QED header's features that says that there is a backing file.
const QED_HAS_BACKING: u64 = 1;
/// First bytes of VMDK images: of extents with a descriptor within, and of a descriptor alone.
const VMDK: [&[u8]; 3] = [b"KDMV", b"COWD", b"# Disk DescriptorFile"];
/// What a VMDK descriptor has if, and only if, the image has a parent.
const VMDK_PARENT: &[u8] = b"parentFileNameHint";
/// QEMU looks for a parent in that much of a descriptor, in bytes.
const VMDK_DESCRIPTOR: u64 = 20 * 512;

/// The backing string of an image, as it stands there; none where the format has none, or isn't known. It fails where
/// there may be one that can't be told.
pub fn backing_of(image: &mut (impl Read + Seek)) -> Result<Option<String>, HeaderError> {
    let start = read_at(image, 0, 64)?;
    match () {
        () if start.starts_with(&QED) => qed(image, &start),
        () if VMDK.iter().any(|magic| start.starts_with(magic)) => vmdk(image, &start).map(|()| None),
        () => match qcow2::read_header(image) {
            Ok(header) => Ok(header.backing),
            Err(HeaderError::NotQcow2) => Ok(None),
            Err(error) => Err(error),
        },
    }
}

fn qed(image: &mut (impl Read + Seek), start: &[u8]) -> Result<Option<String>, HeaderError> {
    let number = |at: usize, bytes: usize| start.get(at..at + bytes).map(little_endian).ok_or(HeaderError::BadBacking);
    if number(16, 8)? & QED_HAS_BACKING == 0 {
        return Ok(None);
    }
    let length = u32::try_from(number(60, 4)?).map_err(|_| HeaderError::BadBacking)?;
    qcow2::read_backing(image, number(56, 4)?, length).map(Some)
}

/// A parent is found by more than a name, and nothing of ours has one.
fn vmdk(image: &mut (impl Read + Seek), start: &[u8]) -> Result<(), HeaderError> {
    let at = match start.get(28..36) {
        Some(sectors) if start.starts_with(VMDK[0]) => little_endian(sectors).saturating_mul(512),
        _ => 0,
    };
    let descriptor = read_at(image, at, VMDK_DESCRIPTOR)?;
    let has_parent = descriptor.windows(VMDK_PARENT.len()).any(|words| words == VMDK_PARENT);
    if has_parent { Err(HeaderError::Parent) } else { Ok(()) }
}

/// What is there of `length` bytes.
fn read_at(image: &mut (impl Read + Seek), at: u64, length: u64) -> Result<Vec<u8>, HeaderError> {
    let mut bytes = vec![];
    image.seek(SeekFrom::Start(at))?;
    image.take(length).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn little_endian(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn read(bytes: Vec<u8>) -> Result<Option<String>, HeaderError> {
        backing_of(&mut Cursor::new(bytes))
    }

    fn qed(features: u64, offset: u32, length: u32) -> Vec<u8> {
        let mut bytes = QED.to_vec();
        bytes.resize(16, 0);
        bytes.extend(features.to_le_bytes());
        bytes.resize(56, 0);
        bytes.extend(offset.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.resize(200, 0);
        bytes.extend(b"base.img");
        bytes
    }

    fn vmdk(descriptor: &[u8]) -> Vec<u8> {
        let mut bytes = b"KDMV".to_vec();
        bytes.resize(28, 0);
        bytes.extend(3_u64.to_le_bytes());
        bytes.resize(3 * 512, 0);
        bytes.extend(descriptor);
        bytes
    }

    #[test]
    fn the_backing_string_of_a_qed_image_is_where_its_header_says() {
        assert_eq!(read(qed(1, 200, 8)).unwrap().as_deref(), Some("base.img"));
        assert_eq!(read(qed(6, 200, 8)).unwrap(), None);
        for hostile in [qed(1, 200, 9), qed(1, u32::MAX, 8), qed(1, 200, u32::MAX), QED.to_vec()] {
            assert!(matches!(read(hostile), Err(HeaderError::BadBacking)));
        }
    }

    #[test]
    fn a_vmdk_image_with_a_parent_is_one_that_cannot_be_told() {
        let with = b"# Disk DescriptorFile\nparentCID=1\nparentFileNameHint=\"base.vmdk\"\n";
        assert!(matches!(read(with.to_vec()), Err(HeaderError::Parent)));
        assert!(matches!(read(vmdk(with)), Err(HeaderError::Parent)));
        assert_eq!(read(vmdk(b"# Disk DescriptorFile\nparentCID=ffffffff\n")).unwrap(), None);
    }

    #[test]
    fn a_file_of_no_known_format_backs_onto_nothing() {
        for bytes in [vec![], vec![0; 4096], b"text".to_vec()] {
            assert_eq!(read(bytes).unwrap(), None);
        }
    }
}
