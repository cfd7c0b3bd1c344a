//! Devices that can't take a layer, which are as they were.

use freezeframe_node_agent::hypervisor::lock::ImageLock;

use super::*;

type Spoil = fn(&Path);

fn create(device: &Path, options: &str, size: &str) {
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, path(device), size]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_cannot_take_the_layer_is_refused_in_words_and_left_as_it_was() {
    let cases: [(&str, Spoil); 7] = [
        ("not a qcow2 image", |device| {
            run("dd", &["if=/dev/zero", &format!("of={}", path(device)), "bs=64k", "count=1", "status=none"]);
        }),
        ("has 65536 bytes", |device| create(device, "compat=1.1", "64k")),
        ("needs another file", |device| {
            run("qemu-img", &["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/dev/null", path(device)]);
        }),
        ("is not empty", |device| run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 64k", path(device)])),
        ("is not empty", |device| create(device, "preallocation=metadata", "768k")),
        ("is not empty", |device| run("qemu-img", &["snapshot", "-c", "old", path(device)])),
        // A refcount of a cluster that nobody uses.
        ("finds fault", |device| {
            run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 64k", path(device)]);
            let table = std::fs::OpenOptions::new().write(true).open(device).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&table, &[0; 8], 3 << 16).unwrap();
            table.sync_all().unwrap();
        }),
    ];
    let mut on = OnDevice::start(Base::Raw).await;
    for (why, spoil) in cases {
        println!("{why}");
        on.format();
        spoil(&on.device.0);
        let before = on.bytes();
        let (reason, message) = on.refusal().await;
        assert_eq!(reason, reasons::INVALID_TARGET, "{message}");
        assert!(message.contains(why) && message.contains(path(&on.device.0)), "{message}");
        assert!(on.bytes() == before, "{why}: the device isn't as it was");
    }
    on.format();
    let before = on.bytes();
    let held = ImageLock::take_device(&on.device.0).unwrap();
    assert!(on.refusal().await.1.contains("in use"));
    drop(held);
    assert!(on.bytes() == before);
    on.check().await;
    let taken = on.take().await;
    on.delete(taken).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_on_which_a_full_layer_has_no_room_is_refused_with_both_numbers() {
    let mut on = OnDevice::start(Base::Raw).await;
    let data = on.lab.images().with_file_name("layer.data");
    let needed = |message: &str| {
        let numbers = message.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse::<u64>().ok());
        numbers.filter(|number| *number > 1 << 19).collect::<Vec<_>>()
    };
    let device = on.device.0.clone();
    let resize = |size: u64| {
        std::fs::File::options().write(true).open(&data).unwrap().set_len(size).unwrap();
        run("losetup", &["-c", path(&device)]);
    };
    resize(1 << 20);
    let (reason, message) = on.refusal().await;
    assert_eq!(reason, reasons::INVALID_TARGET, "{message}");
    let numbers = needed(&message);
    assert!(numbers.len() == 2 && numbers[0] == 1 << 20 && numbers[1] > REGION * REGIONS as u64, "{message}");
    resize(numbers[1].next_multiple_of(4096) + 4096);
    let taken = on.take().await;
    for region in 0..REGIONS {
        on.lab.machine.write("vda", region, 9).await;
        on.lab.disks[0].now[region] = 9;
    }
    on.delete(taken).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_outside_the_image_roots_or_that_is_mounted_is_refused() {
    let mut on = OnDevice::start(Base::Raw).await;
    let roots = on.lab.sessions.roots.clone();
    on.lab.sessions.roots = ImageRoots::new(vec![on.lab.images(), on.lab.images().with_file_name("targets")]);
    let (reason, message) = on.refusal().await;
    assert_eq!(reason, reasons::INVALID_TARGET, "{message}");
    assert!(message.contains("beneath an image root"), "{message}");
    on.lab.sessions.roots = roots;
    on.clear();
    run("mkfs.ext4", &["-q", "-F", path(&on.device.0)]);
    let mounted = on.lab.images().with_file_name("mounted");
    std::fs::create_dir(&mounted).unwrap();
    run("mount", &[path(&on.device.0), path(&mounted)]);
    let (reason, message) = on.refusal().await;
    run("umount", &[path(&mounted)]);
    assert_eq!(reason, reasons::INVALID_TARGET, "{message}");
    assert!(message.contains("in use"), "{message}");
    on.check().await;
}
