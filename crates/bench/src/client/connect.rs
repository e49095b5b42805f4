use std::fmt;
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::error::Error;

/// Base address of a server: `host:port`, `http://host:port/base` or `https://host`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Whether connections are encrypted.
    pub tls: bool,
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
    /// What comes before every route; no slash at its end.
    pub base: String,
}

impl FromStr for Endpoint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = |why: &str| Error::setting("endpoint", format!("{text:?} {why}"));
        let (tls, rest) = match text.split_once("://") {
            Some(("http", rest)) => (false, rest),
            Some(("https", rest)) => (true, rest),
            Some(_) => return Err(bad("has a scheme other than http and https")),
            None => (false, text),
        };
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        if path.contains(['?', '#', ' ']) || authority.contains(['@', ' ']) {
            return Err(bad("is no base address such as http://host:8000"));
        }
        let default_port = if tls { 443 } else { 80 };
        // A colon inside brackets belongs to an IPv6 address.
        let colon = authority.rfind(':').filter(|at| !authority[*at..].contains(']'));
        let (host, port) = match colon {
            Some(at) => {
                (&authority[..at], authority[at + 1..].parse().map_err(|_| bad("has no valid port"))?)
            }
            None => (authority, default_port),
        };
        if host.is_empty() || port == 0 {
            return Err(bad("names no host"));
        }
        // Users paste the address that clients of the OpenAI API want, which ends in /v1.
        let base = path.trim_end_matches('/');
        let base = base.strip_suffix("/v1").unwrap_or(base);
        Ok(Self { tls, host: host.into(), port, base: base.into() })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https" } else { "http" };
        write!(f, "{scheme}://{}:{}{}", self.host, self.port, self.base)
    }
}

/// A byte stream to a server.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A connection that is being made.
pub type Connecting = Pin<Box<dyn Future<Output = io::Result<Box<dyn Stream>>> + Send>>;

/// Makes connections. [`Network`] is the only one outside of tests.
pub trait Connect: Send + Sync {
    /// Starts one.
    fn connect(&self, endpoint: &Endpoint) -> Connecting;
}

/// TCP, with TLS where the endpoint says so. By default it trusts the public certificate authorities.
#[derive(Clone, Default)]
pub struct Network {
    tls: Option<Arc<ClientConfig>>,
}

impl Network {
    /// Trusts the certificates in a PEM file too.
    pub fn trusting(path: &Path) -> Result<Self, Error> {
        let certificates = CertificateDer::pem_file_iter(path).map_err(|e| Error::file(path, e))?;
        let mut roots = public_roots();
        let mut count = 0;
        for certificate in certificates {
            let certificate = certificate.map_err(|e| Error::file(path, e))?;
            roots.add(certificate).map_err(|e| Error::file(path, e))?;
            count += 1;
        }
        if count == 0 {
            return Err(Error::file(path, "has no certificate in PEM form"));
        }
        Ok(Self { tls: Some(tls_config(roots)) })
    }
}

impl Connect for Network {
    fn connect(&self, endpoint: &Endpoint) -> Connecting {
        let endpoint = endpoint.clone();
        let tls = self.tls.clone();
        Box::pin(async move {
            let host = endpoint.host.trim_start_matches('[').trim_end_matches(']').to_string();
            let tcp = TcpStream::connect((host.as_str(), endpoint.port)).await?;
            tcp.set_nodelay(true)?;
            if !endpoint.tls {
                return Ok(Box::new(tcp) as Box<dyn Stream>);
            }
            let name = ServerName::try_from(host).map_err(io::Error::other)?;
            let stream = TlsConnector::from(tls.unwrap_or_else(public_config)).connect(name, tcp).await?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        })
    }
}

fn public_roots() -> RootCertStore {
    RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() }
}

fn public_config() -> Arc<ClientConfig> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    CONFIG.get_or_init(|| tls_config(public_roots())).clone()
}

fn tls_config(roots: RootCertStore) -> Arc<ClientConfig> {
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Arc::new(builder.expect("the provider has them").with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let shown = |text: &str| text.parse::<Endpoint>().unwrap().to_string();
        assert_eq!(shown("127.0.0.1:8000"), "http://127.0.0.1:8000");
        assert_eq!(shown("http://h:1/"), "http://h:1");
        assert_eq!(shown("https://api.example.com/v1"), "https://api.example.com:443");
        assert_eq!(shown("https://proxy/base/v1/"), "https://proxy:443/base");
        assert_eq!(shown("[::1]:8000"), "http://[::1]:8000");
        for bad in ["", ":80", "ftp://h", "h:x", "h:99999", "h:0", "http://", "h:1?a=b", "u@h:1"] {
            let error = bad.parse::<Endpoint>().unwrap_err();
            assert!(error.to_string().starts_with("endpoint: "), "{bad}: {error}");
        }
    }
}
