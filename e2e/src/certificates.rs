//! A certificate authority for one control plane, by openssl.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::tool::run_command;

/// Names under which the API server may be reached.
const SERVER_NAMES: &str =
    "IP:127.0.0.1,IP:10.0.0.1,DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc";

/// The authority and what it has signed, as `<name>.key` and `<name>.crt` in one directory.
#[derive(Debug)]
pub(crate) struct Certificates {
    directory: PathBuf,
}

impl Certificates {
    /// Makes the authority, the server's certificate and the key pair that signs service account tokens.
    pub(crate) fn create(directory: &Path) -> Result<Self> {
        let made = Self { directory: directory.to_owned() };
        made.key("ca")?;
        made.openssl("req -x509 -new -key ca.key -subj /CN=freezeframe-test-ca -days 3650 -out ca.crt")?;
        made.sign("apiserver", "/CN=kube-apiserver", "serverAuth", Some(SERVER_NAMES))?;
        made.openssl("genrsa -out sa.key 2048")?;
        made.openssl("rsa -in sa.key -pubout -out sa.pub")?;
        Ok(made)
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.directory.join(file)
    }

    /// A client certificate of `user` in `groups`, and a kubeconfig `<name>.kubeconfig` that uses it.
    pub(crate) fn client(&self, name: &str, user: &str, groups: &[&str], server: &str) -> Result<PathBuf> {
        let organizations = groups.iter().map(|group| format!("/O={group}"));
        let subject: Vec<_> = organizations.chain([format!("/CN={user}")]).collect();
        self.sign(name, &subject.concat(), "clientAuth", None)?;
        let path = self.path(&format!("{name}.kubeconfig"));
        let file = |suffix: &str| self.path(&format!("{name}.{suffix}")).display().to_string();
        let kubeconfig = serde_json::json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": server, "certificate-authority": self.path("ca.crt")}}],
            "users": [{"name": name, "user": {"client-certificate": file("crt"), "client-key": file("key")}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
        });
        std::fs::write(&path, kubeconfig.to_string()).context("writing a kubeconfig")?;
        Ok(path)
    }

    fn sign(&self, name: &str, subject: &str, usage: &str, names: Option<&str>) -> Result<()> {
        self.key(name)?;
        let alternative = names.map(|names| format!("subjectAltName={names}\n")).unwrap_or_default();
        std::fs::write(self.path(&format!("{name}.ext")), format!("extendedKeyUsage={usage}\n{alternative}"))?;
        let subject = OsString::from(subject);
        let mut request = Command::new("openssl");
        request
            .args(["req", "-new", "-out", &format!("{name}.csr"), "-key", &format!("{name}.key"), "-subj"])
            .arg(subject);
        run_command(request.current_dir(&self.directory))?;
        self.openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -out {name}.crt -extfile {name}.ext"
        ))
    }

    fn key(&self, name: &str) -> Result<()> {
        self.openssl(&format!("ecparam -genkey -name prime256v1 -noout -out {name}.key"))
    }

    /// `arguments` are split at spaces: none of ours has one.
    fn openssl(&self, arguments: &str) -> Result<()> {
        run_command(Command::new("openssl").args(arguments.split(' ')).current_dir(&self.directory)).map(drop)
    }
}
