//! Web pages on other origins: which ones are listed, and the headers that let them read answers: [`Origins`], [`share`].
//!
//! The headers are those of CORS ([Fetch section 3.3](https://fetch.spec.whatwg.org/#http-cors-protocol)). tower-http's layer
//! would answer every `OPTIONS` request itself, also those that are for the API.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{
        HeaderMap, HeaderName, HeaderValue, Method, StatusCode,
        header::{
            ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
            ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_HEADERS,
            ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
        },
    },
    middleware::Next,
    response::{IntoResponse, Response},
};
use url::Url;

use crate::{metrics::RequestTracker, reply::Refusal, server};

/// How long a browser may reuse the answer to a preflight request, in seconds. Chromium caps it at this value.
const MAX_AGE: HeaderValue = HeaderValue::from_static("7200");

/// The headers of an answer that pages may read. CORS has no prefixes.
const EXPOSED: HeaderValue = HeaderValue::from_static(
    "x-request-id, retry-after, retry-after-ms, ratelimit, ratelimit-policy, x-ratelimit-limit, x-ratelimit-remaining, \
     x-ratelimit-reset, x-ratelimit-reset-after, x-ratelimit-limit-requests, x-ratelimit-remaining-requests, \
     x-ratelimit-reset-requests, x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens",
);

const REQUEST_PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-request-private-network");
const ALLOW_PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-allow-private-network");

/// The value of one `--allow-origin`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `*`: every page.
    Any,
    /// One origin, as browsers write it.
    Exact(String),
    /// The subdomains of a domain over https: `.example.com`, with a port if it is not 443.
    Below(String),
}

impl Origin {
    /// Parses `https://app.example`, `https://*.example.com` or `*`. Upper case, the scheme's own port and international
    /// names are written as browsers do.
    ///
    /// # Errors
    ///
    /// A message that explains the problem.
    pub fn parse(value: &str) -> Result<Self, String> {
        let invalid = |reason: &str| Err(format!("{value:?} {reason}"));
        match value {
            "*" => return Ok(Self::Any),
            "null" => {
                return invalid("stands for every sandboxed page and local file, so it cannot be listed");
            }
            _ => {}
        }
        let Some((scheme, authority)) = value.split_once("://") else {
            return invalid("must be an origin, for example https://app.example");
        };
        let is_more =
            |letter: char| "/\\?#@".contains(letter) || letter.is_whitespace() || letter.is_control();
        if authority.contains(is_more) {
            return invalid("must end with the host or port, without a slash: https://app.example");
        }
        let (is_below, host) = match authority.strip_prefix("*.") {
            Some(domain) => (true, domain),
            None => (false, authority),
        };
        if host.contains('*') {
            return invalid("may contain * only in place of subdomains, as in https://*.example.com");
        }
        let Ok(url) = Url::parse(&format!("{scheme}://{host}")) else {
            return invalid("is not a valid origin");
        };
        let origin = match (url.scheme(), url.host_str()) {
            ("http" | "https", Some(_)) => url.origin().ascii_serialization(),
            // Apps and browser extensions, such as `tauri://localhost`.
            (_, Some(_)) if !url.is_special() => format!("{scheme}://{host}").to_ascii_lowercase(),
            _ => return invalid("must begin with the scheme of a page, such as https"),
        };
        match (is_below, origin.strip_prefix("https://")) {
            (false, _) => Ok(Self::Exact(origin)),
            (true, Some(domain))
                if url.domain().is_some_and(|domain| domain.trim_end_matches('.').contains('.')) =>
            {
                Ok(Self::Below(format!(".{domain}")))
            }
            (true, _) => invalid(
                "must name subdomains over https of a domain with two parts, as in https://*.example.com",
            ),
        }
    }

    fn covers(&self, origin: &str) -> bool {
        let is_label = |label: &str| {
            let is_plain =
                |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_".contains(&byte);
            !label.is_empty() && label.bytes().all(is_plain)
        };
        match self {
            Self::Any => true,
            Self::Exact(listed) => listed == origin,
            Self::Below(domain) => origin
                .strip_prefix("https://")
                .and_then(|authority| authority.strip_suffix(&**domain))
                .is_some_and(|subdomain| subdomain.split('.').all(is_label)),
        }
    }
}

/// The origins whose pages may call the proxy. Cheap to clone; the default lists none.
#[derive(Clone, Debug, Default)]
pub struct Origins(Arc<[Origin]>);

impl Origins {
    pub fn new(listed: Vec<Origin>) -> Self {
        Self(listed.into())
    }

    /// Returns the value of `Access-Control-Allow-Origin` for a request with these headers; `None` if it comes from no page.
    ///
    /// # Errors
    ///
    /// It comes from a page that is not listed.
    pub fn admit(&self, headers: &HeaderMap) -> Result<Option<HeaderValue>, Refusal> {
        let mut values = headers.get_all(ORIGIN).iter();
        let Some(origin) = values.next() else { return Ok(None) };
        if self.0.contains(&Origin::Any) {
            return Ok(Some(HeaderValue::from_static("*")));
        }
        let is_listed = |origin: &str| self.0.iter().any(|listed| listed.covers(origin));
        match origin.to_str() {
            Ok(text) if values.next().is_none() && is_listed(text) => Ok(Some(origin.clone())),
            _ => Err(Refusal::OriginNotAllowed),
        }
    }

    /// Whether a request with these headers comes from a listed page.
    pub fn list(&self, headers: &HeaderMap) -> bool {
        matches!(self.admit(headers), Ok(Some(_)))
    }
}

/// Refuses pages that are not listed, answers the preflight requests of the others, and lets them read all answers, also the
/// proxy's own: without these headers, a page would see no more than a failed connection.
pub async fn share(State(origins): State<Origins>, request: Request, next: Next) -> Response {
    let admitted = origins.admit(request.headers());
    let mut response = match &admitted {
        Err(refusal) => {
            let tracker = RequestTracker::new(request.method(), request.uri().path());
            tracker.track_response(refusal.into_response())
        }
        Ok(Some(_)) if is_preflight(&request) => preflight(request.headers()),
        Ok(_) => next.run(request).await,
    };
    let headers = response.headers_mut();
    headers.append(VARY, HeaderValue::from_static("origin"));
    if let Ok(Some(origin)) = admitted {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, EXPOSED);
    }
    response
}

fn is_preflight(request: &Request) -> bool {
    *request.method() == Method::OPTIONS
        && request.headers().contains_key(ACCESS_CONTROL_REQUEST_METHOD)
        && !server::has_large_headers(request.headers())
}

/// Allows what the page wants to send: whether it may is decided when the request itself comes, whose answer it can read. A list
/// of headers would break with each new client that sends another one.
fn preflight(requested: &HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let headers = response.headers_mut();
    headers.insert(ACCESS_CONTROL_MAX_AGE, MAX_AGE);
    for (request, answer) in [
        (ACCESS_CONTROL_REQUEST_METHOD, ACCESS_CONTROL_ALLOW_METHODS),
        (ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_ALLOW_HEADERS),
        // The proxy may be on a private network, or on this machine: a listed page may call it there.
        (REQUEST_PRIVATE_NETWORK, ALLOW_PRIVATE_NETWORK),
    ] {
        if let Some(value) = requested.get(&request) {
            headers.insert(answer, value.clone());
        }
        headers.append(VARY, request.into());
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origins(listed: &[&str]) -> Origins {
        Origins::new(listed.iter().map(|origin| Origin::parse(origin).unwrap()).collect())
    }

    fn headers(values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (ORIGIN, HeaderValue::from_bytes(value.as_bytes()).unwrap())).collect()
    }

    #[test]
    fn origins_are_written_as_browsers_do() {
        for (value, expected) in [
            ("https://app.example", "https://app.example"),
            ("HTTPS://App.Example:443", "https://app.example"),
            ("http://localhost:3000", "http://localhost:3000"),
            ("http://127.0.0.1:80", "http://127.0.0.1"),
            ("http://[::1]:3000", "http://[::1]:3000"),
            ("https://bücher.example", "https://xn--bcher-kva.example"),
            ("tauri://localhost", "tauri://localhost"),
            ("Capacitor://LocalHost", "capacitor://localhost"),
            ("chrome-extension://abcdefgh", "chrome-extension://abcdefgh"),
        ] {
            assert_eq!(Origin::parse(value), Ok(Origin::Exact(expected.to_owned())), "{value}");
        }
        for (value, expected) in [
            ("https://*.example.com", ".example.com"),
            ("https://*.Example.com:443", ".example.com"),
            ("https://*.a.example.com:8443", ".a.example.com:8443"),
        ] {
            assert_eq!(Origin::parse(value), Ok(Origin::Below(expected.to_owned())), "{value}");
        }
        assert_eq!(Origin::parse("*"), Ok(Origin::Any));
    }

    #[test]
    fn other_values_are_refused() {
        for (value, reason) in [
            ("null", "every sandboxed page"),
            ("app.example", "must be an origin"),
            ("https:app.example", "must be an origin"),
            ("", "must be an origin"),
            ("https://app.example/", "without a slash"),
            ("https://app.example/chat", "without a slash"),
            ("https://app.example?x", "without a slash"),
            ("https://app.example#x", "without a slash"),
            ("https://me@app.example", "without a slash"),
            ("https://app.example\\", "without a slash"),
            ("https://app .example", "without a slash"),
            ("https://", "not a valid origin"),
            ("https://app.example:99999", "not a valid origin"),
            ("https://[::1", "not a valid origin"),
            ("wss://app.example", "scheme of a page"),
            ("file://", "scheme of a page"),
            ("tauri://", "scheme of a page"),
            ("https://*", "only in place of subdomains"),
            ("https://app.*.example", "only in place of subdomains"),
            ("https://*app.example", "only in place of subdomains"),
            ("https://*.*.example", "only in place of subdomains"),
            ("https://*.com", "two parts"),
            ("https://*.com.", "two parts"),
            ("https://*.192.0.2.7", "two parts"),
            ("http://*.example.com", "over https"),
            ("tauri://*.example.com", "over https"),
        ] {
            let error = Origin::parse(value).unwrap_err();
            assert!(error.contains(reason) && error.contains(&format!("{value:?}")), "{error}");
        }
    }

    #[test]
    fn only_listed_pages_are_admitted() {
        let listed = origins(&["https://app.example", "https://*.example.com", "http://localhost:3000"]);
        for origin in [
            "https://app.example",
            "https://a.example.com",
            "https://a-1.b_2.example.com",
            "http://localhost:3000",
        ] {
            assert_eq!(listed.admit(&headers(&[origin])), Ok(Some(origin.parse().unwrap())), "{origin}");
            assert!(listed.list(&headers(&[origin])));
        }
        for values in [
            &["null"][..],
            &[""],
            &["*"],
            &["http://app.example"],
            &["https://app.example:8443"],
            &["https://app.example/"],
            &["https://app.example."],
            &["https://APP.example"],
            &["https://app.example.evil.example"],
            &["https://example.com"],
            &["https://.example.com"],
            &["https://a..example.com"],
            &["https://evil.example:1.example.com"],
            &["https://evil.example/.example.com"],
            &["https://me@a.example.com"],
            &["https://evilexample.com"],
            &["http://a.example.com"],
            &["https://a.example.com:8443"],
            &["http://localhost"],
            &["https://ä.example.com"],
            &["https://app.example, https://app.example"],
            &["https://app.example", "https://app.example"],
            &["https://app.example", "https://evil.example"],
        ] {
            assert_eq!(listed.admit(&headers(values)), Err(Refusal::OriginNotAllowed), "{values:?}");
            assert!(!listed.list(&headers(values)));
        }
        assert_eq!(listed.admit(&HeaderMap::new()), Ok(None));
        assert!(!listed.list(&HeaderMap::new()));
    }

    #[test]
    fn every_page_is_admitted_by_an_asterisk() {
        for values in [&["https://app.example"][..], &["null"], &["https://a.example", "https://b.example"]] {
            let any = HeaderValue::from_static("*");
            assert_eq!(origins(&["https://b.example", "*"]).admit(&headers(values)), Ok(Some(any)));
        }
        assert_eq!(origins(&["*"]).admit(&HeaderMap::new()), Ok(None));
    }
}
