//! Who may read: a browser on this machine that asks by a name of this machine, or one that has shown the token.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, anyhow};
use sha2::{Digest, Sha256};

/// What is asked of a request.
#[derive(Debug)]
pub struct Access {
    address: SocketAddr,
    /// Only where others than this machine can ask.
    token: Option<String>,
}

impl Access {
    /// For a server at this address.
    pub fn new(address: SocketAddr) -> Result<Access> {
        let token = if address.ip().is_loopback() { None } else { Some(random()?) };
        Ok(Access { address, token })
    }

    /// The token, if there is one.
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// Whether `Host` names this server. A page of another site that made its own name point here would send that
    /// name; it cannot send an address.
    pub fn is_host(&self, host: &str) -> bool {
        let port = self.address.port();
        // Clients leave HTTP's own port away.
        let name = host.strip_suffix(&format!(":{port}")).or((port == 80).then_some(host));
        let Some(name) = name else { return false };
        if ["localhost", "127.0.0.1", "[::1]"].contains(&name.to_ascii_lowercase().as_str()) {
            return true;
        }
        let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
        let named: Option<IpAddr> = bare.parse().ok();
        let given = self.address.ip();
        named.is_some_and(|named| named == given || given.is_unspecified())
    }

    /// Whether this text is the token. Digests are compared, so that time tells nothing of how much was right.
    pub fn is_token(&self, text: &str) -> bool {
        self.token.as_ref().is_none_or(|token| Sha256::digest(token) == Sha256::digest(text))
    }

    /// Whether the cookies of a request hold the token.
    pub fn is_known(&self, cookies: &str) -> bool {
        let own =
            |cookie: &str| cookie.trim().strip_prefix(&self.cookie())?.strip_prefix('=').map(str::to_owned);
        self.token.is_none() || cookies.split(';').filter_map(own).any(|text| self.is_token(&text))
    }

    /// The name of the cookie; ports share cookies.
    pub fn cookie(&self) -> String {
        format!("temper-{}", self.address.port())
    }
}

fn random() -> Result<String> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|error| anyhow!("the system gives no random numbers: {error}"))?;
    Ok(temper::hex(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(address: &str, names: &[&str]) -> Vec<bool> {
        let access = Access::new(address.parse().unwrap()).unwrap();
        names.iter().map(|name| access.is_host(name)).collect()
    }

    #[test]
    fn names_of_others_are_no_host() {
        let own = ["127.0.0.1:6007", "localhost:6007", "LOCALHOST:6007", "[::1]:6007"];
        let others =
            ["", "localhost", "evil.example:6007", "127.0.0.1:80", "127.0.0.1.evil:6007", "10.0.0.1:6007"];
        assert_eq!(hosts("127.0.0.1:6007", &own), [true; 4]);
        assert_eq!(hosts("127.0.0.1:6007", &others), [false; 6]);
        assert_eq!(
            hosts("0.0.0.0:6007", &["10.0.0.1:6007", "[fe80::1]:6007", "name:6007"]),
            [true, true, false]
        );
        assert_eq!(hosts("10.0.0.1:6007", &["10.0.0.1:6007", "10.0.0.2:6007"]), [true, false]);
        let without_port =
            ["127.0.0.1", "localhost", "[::1]", "localhost:80", "evil.example", "localhost:81"];
        assert_eq!(hosts("127.0.0.1:80", &without_port), [true, true, true, true, false, false]);
    }

    #[test]
    fn only_the_token_lets_in() {
        let access = Access::new("0.0.0.0:6007".parse().unwrap()).unwrap();
        let token = access.token().unwrap();
        assert_eq!(token.len(), 64);
        assert!(access.is_known(&format!("a=b; temper-6007={token}")));
        for wrong in ["", "temper-6007=", &format!("temper-6008={token}"), &format!("temper-6007={token}0")] {
            assert!(!access.is_known(wrong), "{wrong}");
        }
        assert!(Access::new("127.0.0.1:6007".parse().unwrap()).unwrap().is_known(""));
    }
}
