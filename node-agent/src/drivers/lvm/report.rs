//! What `lvm2` reports of volumes, as JSON.

use serde::Deserialize;

use super::tags::{REPLACED, is_claim, tag, target_tag};

/// All that we read of a volume, its pool and its group.
const FIELDS: &str = "lv_name,lv_uuid,lv_attr,lv_size,lv_metadata_size,origin,origin_size,pool_lv,segtype,data_percent,\
                      metadata_percent,lv_tags,lv_health_status,vg_free,vg_extent_size,chunk_size";
/// What has `lvs` print a report that [`parse`] reads.
pub const FORMAT: [&str; 7] = ["--reportformat", "json", "--units", "b", "--nosuffix", "--options", FIELDS];

/// One volume as LVM reports it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Row {
    /// Its name.
    pub lv_name: String,
    /// What it is, whatever it is called.
    pub lv_uuid: String,
    /// Ten flags, see lvs(8).
    pub lv_attr: String,
    /// Its size, in bytes; of a thick snapshot the size of the space for changes.
    #[serde(deserialize_with = "number")]
    pub lv_size: u64,
    /// Size of a pool's metadata, in bytes.
    #[serde(deserialize_with = "number")]
    pub lv_metadata_size: u64,
    /// Name of the volume that it is a snapshot of; empty if of none.
    pub origin: String,
    /// Size of that volume, in bytes, for a thick snapshot.
    #[serde(deserialize_with = "number")]
    pub origin_size: u64,
    /// Name of its thin pool; empty if it is thick.
    pub pool_lv: String,
    /// Its kind, such as `linear` or `thin`.
    pub segtype: String,
    /// How full it is, in percent; empty where that means nothing.
    pub data_percent: String,
    /// How full a pool's metadata is, in percent.
    pub metadata_percent: String,
    /// Its tags, with commas between.
    pub lv_tags: String,
    /// What is wrong with it; empty if nothing.
    pub lv_health_status: String,
    /// Free bytes in the volume group.
    #[serde(deserialize_with = "number")]
    pub vg_free: u64,
    /// What the group's volumes' sizes are multiples of, in bytes.
    #[serde(deserialize_with = "number")]
    pub vg_extent_size: u64,
    /// Bytes that a pool gives to a volume at once.
    #[serde(deserialize_with = "number")]
    pub chunk_size: u64,
}

impl Row {
    /// Whether it is the snapshot that we made under this id.
    #[must_use]
    pub fn is_ours(&self, id: &str) -> bool {
        let own = tag(id);
        self.lv_tags.split(',').any(|tag| tag == own)
    }

    /// Whether it is a volume that a restore put away because snapshots of ours need it.
    #[must_use]
    pub fn is_put_away(&self) -> bool {
        self.lv_tags.split(',').any(|tag| tag == REPLACED)
    }

    /// Whether it is a volume of its own, thick or thin, that nothing depends on or was made of.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        matches!(self.flag(0), '-' | 'V') && self.origin.is_empty()
    }

    /// Whether its user made it for copies of VMs of a namespace.
    #[must_use]
    pub fn is_target_of(&self, namespace: &str) -> bool {
        let wanted = target_tag(namespace);
        self.lv_tags.split(',').any(|tag| tag == wanted)
    }

    /// Whether a snapshot or a restore has marked it as its own.
    #[must_use]
    pub fn is_claimed(&self) -> bool {
        self.lv_tags.split(',').any(is_claim)
    }

    /// Whether it is a snapshot that is worth nothing without this volume.
    #[must_use]
    pub fn needs(&self, origin: &str) -> bool {
        self.is_thick_snapshot() && self.origin == origin
    }

    /// Size of what one reads from it, in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        if self.is_thick_snapshot() { self.origin_size } else { self.lv_size }
    }

    /// Whether it is a thick snapshot that lost its contents, because the space for changes was used up.
    #[must_use]
    pub fn is_overflowed(&self) -> bool {
        // Invalid, and invalid while suspended.
        matches!(self.flag(4), 'I' | 'S') || (self.is_thick_snapshot() && self.data_used() >= 100.0)
    }

    /// Whether a process has its device open, or a file system of it is mounted.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.flag(5) == 'o'
    }

    /// Percent of its data space that is in use.
    #[must_use]
    pub fn data_used(&self) -> f64 {
        self.data_percent.parse().unwrap_or(0.0)
    }

    /// Percent of its metadata space that is in use.
    #[must_use]
    pub fn metadata_used(&self) -> f64 {
        self.metadata_percent.parse().unwrap_or(0.0)
    }

    fn is_thick_snapshot(&self) -> bool {
        !self.origin.is_empty() && self.pool_lv.is_empty()
    }

    /// Whether its device appears only if one insists.
    #[must_use]
    pub fn skips_activation(&self) -> bool {
        self.flag(9) == 'k'
    }

    /// Whether its device is there.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.flag(4) == 'a'
    }

    fn flag(&self, at: usize) -> char {
        self.lv_attr.chars().nth(at).unwrap_or('-')
    }
}

/// A number that is empty where it means nothing.
fn number<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<u64, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() { Ok(0) } else { text.parse().map_err(serde::de::Error::custom) }
}

#[derive(Deserialize)]
struct Report {
    report: Vec<Volumes>,
}

#[derive(Deserialize)]
struct Volumes {
    lv: Vec<Row>,
}

/// The volumes of a report.
pub fn parse(report: &[u8]) -> serde_json::Result<Vec<Row>> {
    let report: Report = serde_json::from_slice(report)?;
    Ok(report.report.into_iter().flat_map(|volumes| volumes.lv).collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// As lvm2 2.03.16 prints it.
    const REPORT: &str = r#"{"report": [{"lv": [
        {"lv_name":"a", "lv_uuid":"uuid-a", "lv_attr":"Vwi-aotz--", "lv_size":"536870912", "lv_metadata_size":"", "origin":"",
         "origin_size":"", "pool_lv":"pool", "segtype":"thin", "data_percent":"6.25", "metadata_percent":"",
         "lv_tags":"", "lv_health_status":"", "vg_free":"3208642560", "vg_extent_size":"4194304", "chunk_size":"0"},
        {"lv_name":"pool", "lv_uuid":"uuid-p", "lv_attr":"twi-aotz--", "lv_size":"1073741824", "lv_metadata_size":"4194304", "origin":"",
         "origin_size":"", "pool_lv":"", "segtype":"thin-pool", "data_percent":"3.12", "metadata_percent":"11.04",
         "lv_tags":"", "lv_health_status":"", "vg_free":"3208642560", "vg_extent_size":"4194304", "chunk_size":"65536"},
        {"lv_name":"t-vmsnap-1", "lv_uuid":"uuid-t", "lv_attr":"sri-a-s---", "lv_size":"67108864", "lv_metadata_size":"", "origin":"t",
         "origin_size":"536870912", "pool_lv":"", "segtype":"linear", "data_percent":"0.01", "metadata_percent":"",
         "lv_tags":"freezeframe,freezeframe-1", "lv_health_status":"", "vg_free":"3208642560",
         "vg_extent_size":"4194304", "chunk_size":"4096"}]}]}"#;

    pub(crate) fn row(name: &str) -> Row {
        parse(REPORT.as_bytes()).unwrap().into_iter().find(|row| row.lv_name == name).unwrap()
    }

    #[test]
    fn a_report_is_read_with_its_empty_numbers() {
        let pool = row("pool");
        assert_eq!((pool.lv_size, pool.lv_metadata_size, pool.origin_size), (1 << 30, 4 << 20, 0));
        assert!((pool.metadata_used() - 11.04).abs() < f64::EPSILON);
        assert!(row("a").is_open() && !row("t-vmsnap-1").is_open());
    }

    #[test]
    fn what_is_no_report_is_an_error() {
        for text in ["", "{}", r#"{"report": [{"lv": [{"lv_name": "a"}]}]}"#] {
            assert!(parse(text.as_bytes()).is_err());
        }
    }

    #[test]
    fn only_the_snapshot_of_this_very_id_is_ours() {
        let snapshot = row("t-vmsnap-1");
        assert!(snapshot.is_ours("1"));
        assert!(!snapshot.is_ours("2") && !snapshot.is_ours("") && !row("a").is_ours("1"));
    }

    #[test]
    fn a_target_is_tagged_by_its_user_and_claimed_by_one_snapshot() {
        let mut volume = row("a");
        assert!(volume.is_plain() && !volume.is_target_of("shop") && !volume.is_claimed());
        volume.lv_tags = "backup,freezeframe-target-shop".into();
        assert!(volume.is_target_of("shop") && !volume.is_target_of("sho") && !volume.is_claimed());
        volume.lv_tags += ",freezeframe-0a1b2c3d4e5f";
        assert!(volume.is_claimed());
        assert!(!row("pool").is_plain() && !row("t-vmsnap-1").is_plain());
        assert!(!Row { lv_attr: "owi-a-s---".into(), ..volume }.is_plain(), "an origin");
    }

    #[test]
    fn a_full_or_invalid_thick_snapshot_has_overflowed() {
        let good = row("t-vmsnap-1");
        assert!(!good.is_overflowed());
        assert!(Row { lv_attr: "sri-I-s---".into(), ..good.clone() }.is_overflowed());
        assert!(Row { data_percent: "100.00".into(), ..good }.is_overflowed());
        assert!(!Row { data_percent: "100.00".into(), ..row("a") }.is_overflowed(), "a full thin volume is just full");
    }
}
