//! The files that a backing string may mean. QEMU takes more than a path there: a protocol's name before it, or all of a
//! node's options as JSON.

use serde_json::Value;

use super::qcow2::HeaderError;

/// What QEMU reaches over a network: no file of this node's.
const REMOTE: [&str; 12] =
    ["http", "https", "ftp", "ftps", "ssh", "sftp", "rbd", "iscsi", "iser", "gluster", "nfs", "sheepdog"];
/// What QEMU takes as a name of this node itself, in the address of a server.
const HERE: [&str; 4] = ["localhost", "127.", "[::1]", "::1"];

/// Paths, one of which is the backing image if it is a file or a device of this node; relative ones as they stand there.
/// It fails where that can't be told.
pub fn paths_of(backing: &str) -> Result<Vec<String>, HeaderError> {
    let unclear = || HeaderError::UnclearBacking(backing.to_owned());
    let Some((protocol, rest)) = protocol(backing) else { return Ok(vec![backing.to_owned()]) };
    match protocol {
        "json" => {
            let options = serde_json::from_str(rest).map_err(|_| unclear())?;
            of_options(&options).ok_or_else(unclear)
        }
        "file" | "host_device" => Ok(vec![rest.to_owned()]),
        "nbd" | "nbd+tcp" if is_elsewhere(rest.trim_start_matches('/')) => Ok(vec![]),
        _ if is_remote(protocol) => Ok(vec![]),
        _ => Err(unclear()),
    }
}

/// The part before a colon, unless a slash is before that.
fn protocol(backing: &str) -> Option<(&str, &str)> {
    let (protocol, rest) = backing.split_once(':')?;
    (!protocol.contains('/')).then_some((protocol, rest))
}

fn is_remote(protocol: &str) -> bool {
    REMOTE.contains(&protocol.split('+').next().unwrap_or(protocol))
}

/// Whether a server is known to be on another node: what one on this node serves may be any file.
fn is_elsewhere(server: &str) -> bool {
    !server.is_empty() && !server.starts_with("unix:") && !HERE.iter().any(|here| server.starts_with(here))
}

/// The files in a node's options; none where it can't be told whether there is one.
fn of_options(options: &Value) -> Option<Vec<String>> {
    let texts = texts("", options);
    let of = |key: &'static str| texts.iter().filter(move |(found, _)| *found == key).map(|(_, text)| *text);
    let files: Vec<_> = of("filename").flat_map(|name| [name, name.strip_prefix("file:").unwrap_or(name)]).collect();
    let is_served = of("driver").any(|driver| driver == "nbd");
    let hosts: Vec<_> = of("host").collect();
    let remote = if is_served {
        !hosts.is_empty() && of("path").next().is_none() && hosts.into_iter().all(is_elsewhere)
    } else {
        of("driver").any(is_remote)
    };
    (!files.is_empty() || remote).then(|| files.into_iter().map(str::to_owned).collect())
}

/// All text in some options, each with the last part of its key: they may be nested, or have dots in their keys.
fn texts<'a>(key: &'a str, value: &'a Value) -> Vec<(&'a str, &'a str)> {
    match value {
        Value::String(text) => vec![(key.rsplit('.').next().unwrap_or(key), text)],
        Value::Object(inner) => inner.iter().flat_map(|(key, value)| texts(key, value)).collect(),
        Value::Array(inner) => inner.iter().flat_map(|value| texts(key, value)).collect(),
        _ => vec![],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(backing: &str) -> Option<Vec<String>> {
        paths_of(backing).ok()
    }

    #[test]
    fn a_file_is_found_however_a_header_names_it() {
        for backing in [
            "base.img",
            "file:base.img",
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"base.img"}}"#,
            r#"json:{"file.filename":"base.img","file.driver":"file","driver":"raw"}"#,
            r#"json:{"driver":"throttle","file":{"driver":"raw","file":{"filename":"base.img"}}}"#,
        ] {
            assert!(paths(backing).unwrap().iter().all(|path| path == "base.img"), "{backing}");
            assert!(!paths(backing).unwrap().is_empty(), "{backing}");
        }
        assert_eq!(paths("./a:b").unwrap(), ["./a:b"]);
        let two = r#"json:{"driver":"quorum","children":[{"filename":"a"},{"file":{"filename":"b"}}]}"#;
        let found = paths(two).unwrap();
        assert!(found.contains(&"a".to_owned()) && found.contains(&"b".to_owned()), "{found:?}");
    }

    #[test]
    fn what_lies_on_another_node_is_no_file_of_this_one() {
        for backing in [
            "nbd://10.0.0.1/golden",
            "nbd:10.0.0.1:10809:exportname=golden",
            "https://example.com/golden.qcow2",
            "gluster+tcp://10.0.0.1/volume/golden",
            r#"json:{"driver":"raw","file":{"driver":"nbd","server":{"type":"inet","host":"10.0.0.1","port":"1"}}}"#,
            r#"json:{"driver":"raw","file.driver":"rbd","file.pool":"vms","file.image":"golden"}"#,
        ] {
            assert_eq!(paths(backing), Some(vec![]), "{backing}");
        }
    }

    #[test]
    fn what_may_be_any_file_of_this_node_cannot_be_told() {
        for backing in [
            "nbd:unix:/run/nbd.sock:exportname=base",
            "nbd+unix:///base?socket=/run/nbd.sock",
            "nbd://localhost:10809/base",
            r#"json:{"driver":"nbd","server":{"type":"unix","path":"/run/nbd.sock"}}"#,
            r#"json:{"driver":"nbd","server.type":"inet","server.host":"127.0.0.1","server.port":"10809"}"#,
            r#"json:{"driver":"nbd"}"#,
            r#"json:{"driver":"raw","file":"a-node"}"#,
            "json:{",
            "blkdebug:rules:base.img",
            "unheard-of:base.img",
        ] {
            assert_eq!(paths(backing), None, "{backing}");
        }
    }
}
