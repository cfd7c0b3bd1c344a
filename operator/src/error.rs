//! Why a reconcile broke off, and how long each kind of reason is waited out.

use std::future::Future;
use std::time::Duration;

use kube::core::error_boundary::InvalidObject;
use thiserror::Error;

/// How long one API call may take, the client's own retries included. A call that is late is tried again with fresh
/// eyes; every write is idempotent.
const CALL_TIMEOUT: Duration = Duration::from_secs(20);

/// Why a reconcile broke off.
#[derive(Debug, Error)]
pub enum Error {
    /// The server refused, or wasn't there.
    #[error("{doing}")]
    Api {
        /// What we were doing.
        doing: &'static str,
        /// What came back.
        source: kube::Error,
    },
    /// No answer in time; the call may have had its effect.
    #[error("{doing} got no answer within {} s", CALL_TIMEOUT.as_secs())]
    Timeout {
        /// What we were doing.
        doing: &'static str,
    },
    /// An object isn't of the shape that this version knows.
    #[error("{kind} {name} can't be read: {message}")]
    Unreadable {
        /// The object's kind.
        kind: &'static str,
        /// The object's name.
        name: String,
        /// What is wrong with it.
        message: String,
    },
}

/// What an error asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// Somebody else wrote in between: look again soon.
    Conflict,
    /// The server couldn't: give it time.
    Unavailable,
    /// The server won't: somebody has to change something.
    Refused,
    /// Nothing helps but another version of an object.
    Unreadable,
}

impl Error {
    /// An object that can't be read.
    #[must_use]
    pub fn unreadable(kind: &'static str, object: &InvalidObject) -> Self {
        let name = object.metadata.name.clone().unwrap_or_default();
        Self::Unreadable { kind, name, message: object.error.clone() }
    }

    /// What the error asks for.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Api { source: kube::Error::Api(status), .. } => match status.code {
                409 => ErrorKind::Conflict,
                429 => ErrorKind::Unavailable,
                400..=499 => ErrorKind::Refused,
                _ => ErrorKind::Unavailable,
            },
            Self::Api { .. } | Self::Timeout { .. } => ErrorKind::Unavailable,
            Self::Unreadable { .. } => ErrorKind::Unreadable,
        }
    }
}

impl ErrorKind {
    /// The kind as a metric's label.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Conflict => "conflict",
            Self::Unavailable => "unavailable",
            Self::Refused => "refused",
            Self::Unreadable => "unreadable",
        }
    }
}

/// Makes one API call, within the time that one may take.
pub(crate) async fn bounded<T>(
    doing: &'static str,
    call: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, Error> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(result) => result.map_err(|source| Error::Api { doing, source }),
        Err(_) => Err(Error::Timeout { doing }),
    }
}

/// None for an object that isn't there. The server must say so itself: 404 without this reason is said of a kind that
/// it doesn't serve, or by something in between, and nothing may be deleted on that word.
pub(crate) fn unless_gone<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Err(Error::Api { source: kube::Error::Api(status), .. }) if status.reason == "NotFound" => Ok(None),
        other => other.map(Some),
    }
}
