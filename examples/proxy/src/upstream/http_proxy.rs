//! The HTTP proxy between this one and the API, from the environment: [`HttpProxy`].

use std::{ffi::OsString, fmt, net::IpAddr};

use axum::http::Uri;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};

use crate::config;

/// The variables that name a proxy, the first one that is set first; and those with the hosts that need none.
const PROXY: [&str; 4] = ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"];
const NO_PROXY: [&str; 2] = ["NO_PROXY", "no_proxy"];

/// Chooses the HTTP proxy for a connection. Never used for a loopback address, nor for plain http.
#[derive(Clone, Debug, Default)]
pub struct HttpProxy(Option<Selected>);

#[derive(Clone)]
struct Selected {
    variable: &'static str,
    proxy: String,
    except: String,
}

impl HttpProxy {
    /// Reads `HTTPS_PROXY`, or `ALL_PROXY` if that is not set, and `NO_PROXY`, each in upper or lower case. An empty variable
    /// counts as not set.
    ///
    /// # Errors
    ///
    /// A variable has no usable URL. The error names the variable, and not its value, which may contain a password.
    pub fn from_env(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, config::Error> {
        let first = |names: &[&'static str]| {
            names.iter().find_map(|name| {
                let value = variable(name).filter(|value| !value.is_empty())?;
                let text = value
                    .into_string()
                    .map_err(|_| config::Error::for_flag(name, "the value is not valid Unicode"));
                Some(text.map(|text| (*name, text)))
            })
        };
        let Some((name, value)) = first(&PROXY).transpose()? else { return Ok(Self::default()) };
        let proxy = parse(&value).map_err(|message| config::Error::for_flag(name, message))?;
        let except = first(&NO_PROXY).transpose()?.map(|(_, hosts)| hosts).unwrap_or_default();
        Ok(Self(Some(Selected { variable: name, proxy, except })))
    }

    /// Returns the proxy for this destination; `None` if it is connected to directly.
    pub(super) fn intercept(&self, destination: &Uri) -> Option<Intercept> {
        let Selected { proxy, except, .. } = self.0.as_ref()?;
        if is_loopback(destination.host()?) {
            return None;
        }
        Matcher::builder().https(proxy).no(except).build().intercept(destination)
    }

    /// Returns the variable and the URL of the proxy for this destination, without user and password.
    pub fn describe(&self, destination: &Uri) -> Option<(&'static str, String)> {
        let intercept = self.intercept(destination)?;
        Some((self.0.as_ref()?.variable, intercept.uri().to_string()))
    }
}

/// Checks the URL of a proxy, and adds the scheme that is left out in `host:port`.
fn parse(value: &str) -> Result<String, &'static str> {
    let value = value.trim();
    let url = if value.contains("://") { value.to_owned() } else { format!("http://{value}") };
    let scheme = url.split("://").next().unwrap_or_default().to_ascii_lowercase();
    if scheme.starts_with("socks") {
        return Err("SOCKS proxies are not supported; use the URL of an HTTP proxy");
    }
    let invalid = Err("must be the URL of an HTTP proxy, for example http://proxy.example:3128");
    let Ok(uri) = url.parse::<Uri>() else { return invalid };
    let host = uri.host().unwrap_or_default();
    let port =
        uri.authority().and_then(|authority| authority.as_str().rsplit('@').next()?.strip_prefix(host));
    let is_port = |port: &str| port.is_empty() || port[1..].parse().is_ok_and(|number: u16| number != 0);
    // A password with an unescaped `/`, `?`, `#` or `@` would become part of the host or path, which are printed.
    let is_escaped = match url.matches('@').count() {
        0 => true,
        1 => uri.authority().is_some_and(|authority| authority.as_str().contains('@')),
        _ => false,
    };
    let is_usable = matches!(&*scheme, "http" | "https")
        && is_escaped
        && !host.is_empty()
        && port.is_some_and(is_port)
        && Matcher::builder()
            .https(&url)
            .build()
            .intercept(&Uri::from_static("https://api.invalid"))
            .is_some();
    if is_usable { Ok(url) } else { invalid }
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    match bare.parse::<IpAddr>() {
        Ok(address) => address.to_canonical().is_loopback(),
        Err(_) => bare.trim_end_matches('.').eq_ignore_ascii_case("localhost"),
    }
}

/// Without the URL, which may contain a password.
impl fmt::Debug for Selected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Selected").field("variable", &self.variable).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_env(variables: &[(&str, &str)]) -> Result<HttpProxy, String> {
        let variable = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
        };
        HttpProxy::from_env(variable).map_err(|error| error.to_string())
    }

    /// Returns which proxy leads to `destination`.
    fn route(variables: &[(&str, &str)], destination: &str) -> Option<String> {
        from_env(variables).unwrap().describe(&destination.parse().unwrap()).map(|(_, proxy)| proxy)
    }

    const API: &str = "https://api.selamgpt.com/v1";

    #[test]
    fn the_first_variable_that_is_set_counts() {
        for (variables, expected) in [
            (&[][..], None),
            (&[("HTTPS_PROXY", ""), ("https_proxy", ""), ("ALL_PROXY", ""), ("all_proxy", "")], None),
            (&[("HTTP_PROXY", "http://one")], None),
            (&[("https_proxy", "http://one:1")], Some("http://one:1/")),
            (&[("HTTPS_PROXY", ""), ("https_proxy", "http://one:1")], Some("http://one:1/")),
            (&[("all_proxy", "http://one:1")], Some("http://one:1/")),
            (&[("ALL_PROXY", "socks5://two"), ("HTTPS_PROXY", "http://one:1")], Some("http://one:1/")),
            (&[("HTTPS_PROXY", "https://user:s3cr3t@one:1/")], Some("https://one:1/")),
            (&[("HTTPS_PROXY", " one:1 ")], Some("http://one:1/")),
            (&[("HTTPS_PROXY", "HTTP://[::1]:1")], Some("http://[::1]:1/")),
        ] {
            assert_eq!(route(variables, API).as_deref(), expected, "{variables:?}");
        }
    }

    #[test]
    fn exceptions_and_loopback_need_no_proxy() {
        for (except, destination, expected) in [
            ("", API, true),
            ("selamgpt.com", API, false),
            (".selamgpt.com", API, false),
            ("API.selamgpt.com", API, false),
            ("gpt.com, x", API, true),
            ("x, api.selamgpt.com", API, false),
            ("*", API, false),
            ("10.0.0.0/8", "https://10.1.2.3/v1", false),
            ("10.0.0.0/8", "https://11.1.2.3/v1", true),
            ("", "https://localhost:8443/v1", false),
            ("", "https://LOCALHOST./v1", false),
            ("", "https://127.9.9.9/v1", false),
            ("", "https://[::1]:1/v1", false),
            ("", "https://[::ffff:127.0.0.1]/v1", false),
            ("", "https://127.0.0.1.example/v1", true),
            ("", "http://10.1.2.3/v1", false),
        ] {
            for name in NO_PROXY {
                let variables = [("HTTPS_PROXY", "http://one:1"), (name, except)];
                assert_eq!(route(&variables, destination).is_some(), expected, "{except} {destination}");
            }
        }
    }

    #[test]
    fn unusable_proxies_are_refused_without_their_value() {
        for (value, expected) in [
            ("socks5://user:s3cr3t@one:1", "SOCKS proxies are not supported"),
            ("SOCKS5H://s3cr3t", "SOCKS proxies are not supported"),
            ("ftp://s3cr3t", "must be the URL of an HTTP proxy"),
            ("http://", "must be the URL of an HTTP proxy"),
            ("http://user:s3cr3t@", "must be the URL of an HTTP proxy"),
            ("http://s3cr3t:x", "must be the URL of an HTTP proxy"),
            ("http://s3cr3t:", "must be the URL of an HTTP proxy"),
            ("http://s3cr3t:99999", "must be the URL of an HTTP proxy"),
            ("http://us er:s3cr3t@one", "must be the URL of an HTTP proxy"),
            ("http://user:p@s3cr3t@one:1", "must be the URL of an HTTP proxy"),
            ("http://user:1/s3cr3t@one:1", "must be the URL of an HTTP proxy"),
            ("http://s3cr3t:1#@one:1", "must be the URL of an HTTP proxy"),
            ("http://user:1?s3cr3t@one:1", "must be the URL of an HTTP proxy"),
            ("://s3cr3t", "must be the URL of an HTTP proxy"),
            ("  ", "must be the URL of an HTTP proxy"),
        ] {
            for name in PROXY {
                let error = from_env(&[(name, value)]).unwrap_err();
                assert!(error.starts_with(&format!("{name}: {expected}")), "{value}: {error}");
                assert!(!error.contains("s3cr3t"), "{error}");
            }
        }
    }

    #[test]
    fn debug_shows_no_password() {
        let proxy = from_env(&[("HTTPS_PROXY", "http://user:s3cr3t@one:1")]).unwrap();
        assert!(!format!("{proxy:?}").contains("s3cr3t"));
    }
}
