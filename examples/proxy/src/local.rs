//! Which host a request names, and whether it comes from a program on this machine: [`named_host`], [`check`].

use std::net::IpAddr;

use axum::http::{
    HeaderMap, HeaderName, Uri, Version,
    header::{HOST, ORIGIN, REFERER},
    uri::Authority,
};
use tower_selam::inbound::is_forwarded;

use crate::{browsers::Origins, reply::Refusal};

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Returns the host that the request is for, from its URI or `Host`. `None` if an HTTP/1.0 request names none.
///
/// # Errors
///
/// `Host` is missing, repeated or invalid ([RFC 9112 section 3.2](https://www.rfc-editor.org/rfc/rfc9112#section-3.2)), or
/// differs from the URI ([RFC 9113 section 8.3.1](https://www.rfc-editor.org/rfc/rfc9113#section-8.3.1)), so that a check of one
/// would say nothing about the other.
pub fn named_host(version: Version, uri: &Uri, headers: &HeaderMap) -> Result<Option<Authority>, Refusal> {
    let mut values = headers.get_all(HOST).iter();
    let host = match (values.next(), values.next()) {
        (Some(value), None) => Some(Authority::try_from(value.as_bytes()).map_err(|_| Refusal::BadRequest)?),
        (None, _) => None,
        (Some(_), Some(_)) => return Err(Refusal::BadRequest),
    };
    let names = [uri.authority(), host.as_ref()];
    // What follows the host is a port or nothing, and nothing precedes it.
    let is_plain = |name: &&Authority| {
        let port = name.as_str().strip_prefix(name.host());
        port.is_some_and(|port| matches!(port, "" | ":") || name.port_u16().is_some())
    };
    if !names.iter().flatten().all(is_plain) {
        return Err(Refusal::BadRequest);
    }
    match names {
        [Some(authority), Some(host)] if normalized(authority) != normalized(host) => {
            Err(Refusal::BadRequest)
        }
        [_, None] if version == Version::HTTP_11 => Err(Refusal::BadRequest),
        [authority, host] => Ok(authority.or(host).cloned()),
    }
}

/// Host and port in a form that can be compared.
fn normalized(authority: &Authority) -> (String, u16) {
    let host = authority.host().to_ascii_lowercase();
    (host.strip_suffix('.').unwrap_or(&host).to_owned(), authority.port_u16().unwrap_or(80))
}

/// Checks that a program on this machine sent the request directly. Without client tokens nothing else tells it from a web
/// page that the user happens to visit, whose host name may also resolve to this machine (DNS rebinding), or from a caller on
/// the internet, if somebody puts a tunnel in front of the proxy. Only a listed page may send it as well.
///
/// # Errors
///
/// The reason to refuse the request.
pub fn check(version: Version, uri: &Uri, headers: &HeaderMap, pages: &Origins) -> Result<(), Refusal> {
    if !named_host(version, uri, headers)?.is_some_and(|host| is_loopback(host.host())) {
        return Err(Refusal::ForeignHost);
    }
    if is_forwarded(headers) {
        return Err(Refusal::Forwarded);
    }
    if pages.list(headers) {
        return Ok(());
    }
    // A page on another port of this machine is `same-site`: it may belong to anybody.
    let is_own = |site: &[u8]| matches!(site, b"same-origin" | b"none");
    let sites = headers.get_all(SEC_FETCH_SITE).iter();
    // Old browsers send no `Sec-Fetch-Site`, and `Origin` not with every request.
    let mut pages = headers.get_all(ORIGIN).iter().chain(headers.get_all(REFERER));
    if !sites.map(|site| site.as_bytes()).all(is_own) || !pages.all(|page| is_local_page(page.as_bytes())) {
        return Err(Refusal::ForeignOrigin);
    }
    Ok(())
}

fn is_local_page(page: &[u8]) -> bool {
    let page = Uri::try_from(page).ok();
    page.is_some_and(|page| {
        let is_web = matches!(page.scheme_str(), Some("http" | "https"));
        is_web
            && page.authority().is_some_and(|page| !page.as_str().contains('@') && is_loopback(page.host()))
    })
}

/// Whether this is exactly `localhost` or a loopback address.
fn is_loopback(host: &str) -> bool {
    let host = host.strip_suffix('.').unwrap_or(host);
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost")
        || address.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

#[cfg(test)]
mod tests {
    use axum::http::{HeaderValue, Request, request::Parts};

    use super::*;
    use crate::browsers::Origin;

    fn head(version: Version, uri: &str, headers: &[(&'static str, &'static str)]) -> Parts {
        let mut request = Request::builder().version(version).uri(uri).body(()).unwrap();
        for (name, value) in headers {
            request.headers_mut().append(*name, HeaderValue::from_static(value));
        }
        request.into_parts().0
    }

    fn check_parts(parts: &Parts) -> Result<(), Refusal> {
        check(parts.version, &parts.uri, &parts.headers, &Origins::default())
    }

    #[test]
    fn only_this_machine_is_local() {
        for host in [
            "localhost",
            "LOCALHOST:8080",
            "localhost.",
            "127.0.0.1:8080",
            "127.9.8.7",
            "[::1]",
            "[::1]:8080",
            "[::ffff:127.0.0.1]",
        ] {
            assert_eq!(check_parts(&head(Version::HTTP_11, "/v1", &[("host", host)])), Ok(()), "{host}");
            let absolute = format!("http://{host}/v1");
            assert_eq!(check_parts(&head(Version::HTTP_2, &absolute, &[])), Ok(()), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "evil.localhost",
            "localhost..",
            "0.0.0.0:8080",
            "[::]",
            "192.0.2.7",
            "169.254.169.254",
            "127.1",
            "2130706433",
            "0x7f000001",
            "[::127.0.0.1]",
            "my-machine.local",
        ] {
            let refused = Err(Refusal::ForeignHost);
            assert_eq!(check_parts(&head(Version::HTTP_11, "/v1", &[("host", host)])), refused, "{host}");
            let absolute = format!("http://{host}/v1");
            assert_eq!(check_parts(&head(Version::HTTP_2, &absolute, &[])), refused, "{host}");
        }
        assert_eq!(check_parts(&head(Version::HTTP_10, "/v1", &[])), Err(Refusal::ForeignHost));
    }

    #[test]
    fn host_and_uri_must_agree() {
        for (uri, hosts) in [
            ("/v1", &[][..]),
            ("/v1", &["localhost", "localhost"]),
            ("/v1", &["localhost", "evil.example"]),
            ("/v1", &["a@localhost"]),
            ("/v1", &["localhost, evil.example"]),
            ("/v1", &["local host"]),
            ("/v1", &["http://localhost"]),
            ("/v1", &["localhost/"]),
            ("/v1", &["localhost:99999999"]),
            ("/v1", &[""]),
            ("http://localhost/v1", &["evil.example"]),
            ("http://evil.example/v1", &["localhost"]),
            ("http://localhost:8080/v1", &["localhost:8081"]),
            ("http://localhost:8080/v1", &["localhost"]),
            ("http://user@localhost/v1", &["localhost"]),
        ] {
            let headers: Vec<_> = hosts.iter().map(|host| ("host", *host)).collect();
            let parts = head(Version::HTTP_11, uri, &headers);
            let named = named_host(parts.version, &parts.uri, &parts.headers);
            assert_eq!(named, Err(Refusal::BadRequest), "{uri} {hosts:?}");
        }
        for (version, uri, host) in [
            (Version::HTTP_11, "http://LocalHost:80/v1", Some("localhost")),
            (Version::HTTP_2, "http://localhost/v1", None),
            (Version::HTTP_2, "http://localhost:1/v1", Some("localhost:1")),
            (Version::HTTP_10, "/v1", None),
        ] {
            let parts = head(version, uri, host.map(|host| ("host", host)).as_slice());
            assert!(named_host(parts.version, &parts.uri, &parts.headers).is_ok(), "{uri} {host:?}");
        }
    }

    #[test]
    fn web_pages_and_intermediaries_are_refused() {
        let find = |name, value| {
            check_parts(&head(Version::HTTP_11, "/v1", &[("host", "localhost"), (name, value)]))
        };
        for (name, value) in [
            ("sec-fetch-site", "same-origin"),
            ("sec-fetch-site", "none"),
            ("origin", "http://localhost:3000"),
            ("origin", "http://127.0.0.1:3000"),
            ("origin", "http://[::1]:3000"),
            ("origin", "https://LOCALHOST"),
            ("referer", "http://localhost:8080/v1/models?x=1"),
            ("user-agent", "curl/8.5.0"),
            ("traceparent", "00-1-2-01"),
            ("x-stainless-lang", "python"),
            ("x-ms-client-request-id", "1"),
        ] {
            assert_eq!(find(name, value), Ok(()), "{name}: {value}");
        }
        for (name, value) in [
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
            ("sec-fetch-site", "SAME-ORIGIN"),
            ("sec-fetch-site", ""),
            ("origin", "https://evil.example"),
            ("origin", "http://127.0.0.1.evil.example"),
            ("origin", "http://localhost.evil.example"),
            ("origin", "http://localhost@evil.example"),
            ("origin", "http://evil.example@localhost"),
            ("origin", "null"),
            ("origin", ""),
            ("origin", "localhost"),
            ("origin", "chrome-extension://abcdef"),
            ("origin", "file://"),
            ("referer", "https://evil.example/page"),
            ("referer", "about:blank"),
        ] {
            assert_eq!(find(name, value), Err(Refusal::ForeignOrigin), "{name}: {value}");
        }
        for name in [
            "forwarded",
            "x-forwarded-for",
            "x-forwarded-proto",
            "x_forwarded_host",
            "via",
            "x-real-ip",
            "cf-connecting-ip",
            "cf-ray",
            "cdn-loop",
            "true-client-ip",
            "x-amzn-trace-id",
            "tailscale-user-login",
            "fly-client-ip",
            "x-original-host",
        ] {
            assert_eq!(find(name, "1"), Err(Refusal::Forwarded), "{name}");
        }
    }

    #[test]
    fn listed_pages_are_local_on_this_host_only() {
        let listed = Origins::new(vec![Origin::parse("https://app.example").unwrap()]);
        let page = ("origin", "https://app.example");
        for (headers, expected) in [
            (&[("host", "localhost"), page, ("sec-fetch-site", "cross-site")][..], Ok(())),
            (&[("host", "localhost"), page, ("referer", "https://app.example/chat")], Ok(())),
            (&[("host", "proxy.example"), page], Err(Refusal::ForeignHost)),
            (&[("host", "localhost"), page, ("x-forwarded-for", "192.0.2.7")], Err(Refusal::Forwarded)),
            (&[("host", "localhost"), page, page], Err(Refusal::ForeignOrigin)),
            (&[("host", "localhost"), ("origin", "https://evil.example")], Err(Refusal::ForeignOrigin)),
            // An image or a link on a listed page: browsers do not say which page has it.
            (&[("host", "localhost"), ("sec-fetch-site", "cross-site")], Err(Refusal::ForeignOrigin)),
        ] {
            let parts = head(Version::HTTP_11, "/v1", headers);
            let checked = check(parts.version, &parts.uri, &parts.headers, &listed);
            assert_eq!(checked, expected, "{headers:?}");
        }
    }
}
