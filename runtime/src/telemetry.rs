//! Log output.

use std::io::{self, IsTerminal as _};
use std::str::FromStr;

use thiserror::Error;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::{FromEnvError, LevelFilter};
use tracing_subscriber::util::TryInitError;

/// How a log line looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Why there is no log output.
#[derive(Debug, Error)]
pub enum Error {
    /// `RUST_LOG` can't be read.
    #[error("reading the log filter from RUST_LOG")]
    Filter(#[from] FromEnvError),
    /// Somebody in this process installed a subscriber earlier.
    #[error("installing the log subscriber")]
    Install(#[from] TryInitError),
}

/// Not a log format.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("log format {0:?} is neither \"text\" nor \"json\"")]
pub struct UnknownFormat(String);

impl FromStr for LogFormat {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            other => Err(UnknownFormat(other.to_owned())),
        }
    }
}

/// Sends log lines to standard error: level `info` and above, or what `RUST_LOG` asks for.
pub fn init(format: LogFormat) -> Result<(), Error> {
    use tracing_subscriber::util::SubscriberInitExt as _;

    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).from_env()?;
    let lines =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(io::stderr().is_terminal());
    match format {
        LogFormat::Text => lines.finish().try_init()?,
        LogFormat::Json => lines.json().flatten_event(true).finish().try_init()?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_format_is_text_or_json_and_nothing_else() {
        assert_eq!("text".parse(), Ok(LogFormat::Text));
        assert_eq!("json".parse(), Ok(LogFormat::Json));
        assert!("yaml".parse::<LogFormat>().is_err());
    }
}
