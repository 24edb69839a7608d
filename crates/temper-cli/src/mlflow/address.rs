//! `mlflow=http://HOST:PORT#EXPERIMENT`, as `--log-to` takes it.

use ureq::http::Uri;

/// Experiment of a run that names none.
const EXPERIMENT: &str = "temper";

/// A server, and the experiment there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Without a slash at its end.
    pub uri: String,
    /// The experiment's name.
    pub experiment: String,
}

impl Address {
    /// Parses the value of `--log-to`.
    pub fn parse(text: &str) -> Result<Address, String> {
        let expected = "expected mlflow=http://HOST:PORT, with #EXPERIMENT behind it if not `temper`";
        let rest = text.strip_prefix("mlflow=").ok_or(expected)?;
        let (uri, experiment) = rest.split_once('#').unwrap_or((rest, EXPERIMENT));
        if uri.starts_with("https://") {
            return Err("https is not built in; a tunnel gives the server a local port, as in \
                        `ssh -L 5000:localhost:5000 HOST`"
                .into());
        }
        let parsed: Uri = uri.parse().map_err(|_| expected)?;
        let host = parsed.host().filter(|host| !host.is_empty());
        let plain = parsed.scheme_str() == Some("http") && parsed.query().is_none() && !experiment.is_empty();
        if host.is_none() || !plain || experiment.contains(char::is_control) {
            return Err(expected.into());
        }
        if parsed.authority().is_some_and(|authority| authority.as_str().contains('@')) {
            // The address is shown and stored.
            return Err(
                "give name and password as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the \
                        environment"
                    .into(),
            );
        }
        Ok(Address { uri: uri.trim_end_matches('/').to_owned(), experiment: experiment.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::Address;

    #[test]
    fn a_server_and_an_experiment() {
        let of = |text| Address::parse(text).map(|Address { uri, experiment }| (uri, experiment));
        let expected = |uri: &str, experiment: &str| Ok((uri.to_owned(), experiment.to_owned()));
        assert_eq!(of("mlflow=http://localhost:5000"), expected("http://localhost:5000", "temper"));
        assert_eq!(of("mlflow=http://[::1]:5000/a/#my runs"), expected("http://[::1]:5000/a", "my runs"));
        for wrong in [
            "",
            "wandb",
            "mlflow",
            "mlflow=",
            "mlflow=localhost:5000",
            "mlflow=http://",
            "mlflow=http://a b",
            "mlflow=http://a?b=c",
            "mlflow=file:///tmp/runs",
            "mlflow=http://a#",
            "mlflow=http://a#b\nc",
        ] {
            assert!(of(wrong).unwrap_err().starts_with("expected mlflow="), "{wrong}");
        }
        assert!(of("mlflow=https://a").unwrap_err().contains("ssh -L"));
        assert!(of("mlflow=http://me:secret@a").unwrap_err().contains("MLFLOW_TRACKING_PASSWORD"));
    }
}
