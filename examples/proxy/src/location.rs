//! Rewrites the API's URLs in headers of responses, so that callers stay on the proxy: [`RewriteLocation`].

use std::{
    borrow::Cow,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, Uri,
    header::{AUTHORIZATION, CONTENT_LOCATION, LINK, LOCATION, REFRESH},
};
use tower::Service;
use tower_selam::{BoxError, inbound::EchoMask};
use url::Url;

use crate::{rules::ROOT, voice};

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Headers whose value is one URL.
const URLS: [HeaderName; 3] = [LOCATION, CONTENT_LOCATION, HeaderName::from_static("operation-location")];

/// The query parameters that carry credentials.
const CREDENTIALS: [&str; 2] = ["token", "api_key"];

/// How many layers of percent-encoding are removed to find a secret.
const MAX_DECODINGS: usize = 3;

/// Rewrites `Location`, `Content-Location`, `Operation-Location`, `Refresh` and `Link` of responses: what is below the API's base
/// URL becomes a path below `/v1`, as `ProxyPassReverse` of Apache does. A caller would otherwise follow it past the proxy, with
/// its client token, and maybe over plain http. Other URLs stay, without any credential that the proxy sent.
///
/// It is the innermost layer, where requests have their final URI and credentials.
#[derive(Clone, Debug)]
pub struct RewriteLocation<S> {
    inner: S,
    base: Arc<Url>,
}

impl<S> RewriteLocation<S> {
    /// # Errors
    ///
    /// The base URL is invalid.
    pub fn new(inner: S, base: &str) -> Result<Self, BoxError> {
        Ok(Self { inner, base: Arc::new(Url::parse(base)?) })
    }
}

impl<S, B, R> Service<Request<B>> for RewriteLocation<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = Response<R>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let sent = Sent {
            base: Arc::clone(&self.base),
            uri: request.uri().clone(),
            credentials: [AUTHORIZATION, API_KEY].map(|name| request.headers().get(name).cloned()),
        };
        let response = self.inner.call(request);
        Box::pin(async move {
            let mut response = response.await?;
            sent.rewrite(response.headers_mut());
            if voice::is_path(sent.uri.path()) {
                // The packets may echo the query.
                let secrets: Vec<_> = sent.secrets().collect();
                response.extensions_mut().insert(EchoMask::new(secrets.iter().map(|secret| &**secret)));
            }
            Ok(response)
        })
    }
}

/// What is known of the request that is answered.
struct Sent {
    base: Arc<Url>,
    uri: Uri,
    credentials: [Option<HeaderValue>; 2],
}

impl Sent {
    fn rewrite(&self, headers: &mut HeaderMap) {
        for name in URLS {
            self.replace(headers, &name, |url| self.rewrite_url(url));
        }
        self.replace(headers, &REFRESH, |refresh| self.rewrite_refresh(refresh));
        self.replace(headers, &LINK, |links| self.rewrite_links(links));
    }

    /// Replaces the values of a header. Removes those that still contain a secret.
    fn replace(&self, headers: &mut HeaderMap, name: &HeaderName, rewrite: impl Fn(&str) -> Option<String>) {
        if !headers.contains_key(name) {
            return;
        }
        let rewritten: Vec<HeaderValue> = headers
            .get_all(name)
            .iter()
            .filter_map(|value| {
                let text = String::from_utf8_lossy(value.as_bytes());
                match rewrite(&text) {
                    Some(new) => HeaderValue::from_str(&new).ok().filter(|_| !self.has_secret(&new)),
                    None => Some(value.clone()).filter(|_| !self.has_secret(&text)),
                }
            })
            .collect();
        headers.remove(name);
        for value in rewritten {
            headers.append(name, value);
        }
    }

    /// Returns the URL that takes the place of `url`; `None` if it can stay.
    fn rewrite_url(&self, url: &str) -> Option<String> {
        let sent = Url::parse(&self.uri.to_string()).ok()?;
        let mut target = sent.join(url).ok()?;
        let below = self.below_base(&target);
        if below.is_none() && !self.has_secret(url) {
            return None;
        }
        self.strip_query(&mut target, below.is_some());
        let Some(below) = below else { return Some(target.into()) };
        let mut new = format!("{ROOT}{below}");
        for (mark, part) in [('?', target.query()), ('#', target.fragment())] {
            if let Some(part) = part {
                new.push(mark);
                new.push_str(part);
            }
        }
        Some(new)
    }

    /// The part of the path below the base URL's; `None` if the URL is elsewhere.
    fn below_base(&self, url: &Url) -> Option<String> {
        let base = &self.base;
        let host = |url: &Url| url.host_str().map(|host| host.trim_end_matches('.').to_owned());
        let default_port = |url: &Url| match url.scheme() {
            "http" | "ws" => Some(80),
            "https" | "wss" => Some(443),
            _ => None,
        };
        let (port, own) = (url.port().or(default_port(url))?, default_port(url)?);
        // An API behind a TLS terminator may take itself for plain http, on the port that is usual for it or on the same one.
        let is_port = Some(port) == base.port_or_known_default() || (base.port().is_none() && port == own);
        if host(url) != host(base) || !is_port {
            return None;
        }
        let path = decode_unreserved(url.path());
        let below = path.strip_prefix(base.path().trim_end_matches('/'))?;
        (below.is_empty() || below.starts_with('/')).then(|| below.to_owned())
    }

    /// Removes query parameters with a secret; with `by_name`, also those that are named like a credential.
    fn strip_query(&self, url: &mut Url, by_name: bool) {
        let Some(query) = url.query() else { return };
        let is_kept = |parameter: &&str| {
            let name = parameter.split('=').next().unwrap_or_default();
            let name = decoded(name).to_ascii_lowercase().replace('-', "_");
            let is_credential = by_name && CREDENTIALS.contains(&&*name);
            !is_credential && !self.has_secret(parameter)
        };
        let kept: Vec<&str> = query.split('&').filter(is_kept).collect();
        let kept = kept.join("&");
        url.set_query(Some(&*kept).filter(|kept| !kept.is_empty()));
    }

    /// Rewrites the URL after the number of seconds, where browsers find it: with or without `url=` and quotes
    /// ([HTML section 4.2.5.3](https://html.spec.whatwg.org/multipage/semantics.html#shared-declarative-refresh-steps)).
    fn rewrite_refresh(&self, refresh: &str) -> Option<String> {
        let after = |text: &str| refresh.len() - text.len();
        let rest =
            refresh.trim_start().trim_start_matches(|letter: char| letter.is_ascii_digit() || letter == '.');
        let mut url = rest.trim_start_matches([';', ',', ' ', '\t']);
        if let Some(value) = url.get(3..).filter(|_| url[..3].eq_ignore_ascii_case("url"))
            && let Some(value) = value.trim_start().strip_prefix('=')
        {
            url = value;
        }
        let start = after(url);
        let bare = url.trim();
        if bare.is_empty() {
            return None;
        }
        let bare = match bare.chars().next().filter(|first| matches!(first, '"' | '\'')) {
            Some(quote) => bare[1..].split(quote).next().unwrap_or_default(),
            None => bare,
        };
        Some(format!("{}{}", &refresh[..start], self.rewrite_url(bare)?))
    }

    /// Rewrites the targets of links ([RFC 8288 section 3](https://www.rfc-editor.org/rfc/rfc8288#section-3)).
    fn rewrite_links(&self, links: &str) -> Option<String> {
        let (mut new, mut rest, mut changed) = (String::new(), links, false);
        while let Some((before, after)) = rest.split_once('<') {
            let Some((target, after)) = after.split_once('>') else { break };
            let rewritten = self.rewrite_url(target);
            changed |= rewritten.is_some();
            new.extend([before, "<", rewritten.as_deref().unwrap_or(target), ">"]);
            rest = after;
        }
        new.push_str(rest);
        changed.then_some(new)
    }

    /// Whether the text contains a credential that the request carried, in any percent-encoding.
    fn has_secret(&self, text: &str) -> bool {
        let mut text = Cow::Borrowed(text);
        for _ in 0..=MAX_DECODINGS {
            if self.secrets().any(|secret| text.contains(&*secret)) {
                return true;
            }
            let next = decoded(&text).into_owned();
            if next == *text {
                return false;
            }
            text = Cow::Owned(next);
        }
        false
    }

    fn secrets(&self) -> impl Iterator<Item = Cow<'_, str>> {
        let headers = self.credentials.iter().flatten().filter_map(|value| value.to_str().ok());
        let headers = headers.map(|value| Cow::Borrowed(value.rsplit(' ').next().unwrap_or_default()));
        let query = self.uri.query().unwrap_or_default().split('&');
        let query = query.filter_map(|parameter| parameter.split_once('='));
        let query = query.filter(|(name, _)| CREDENTIALS.contains(name)).map(|(_, value)| decoded(value));
        headers.chain(query).filter(|secret| !secret.is_empty())
    }
}

fn decoded(text: &str) -> Cow<'_, str> {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy()
}

/// Decodes letters, digits and `-._~`, which mean the same encoded or not.
fn decode_unreserved(path: &str) -> String {
    let mut new = String::with_capacity(path.len());
    let mut rest = path;
    while let Some((before, after)) = rest.split_once('%') {
        new.push_str(before);
        let byte = after.get(..2).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match byte {
            Some(byte) if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) => {
                new.push(char::from(byte));
                rest = &after[2..];
            }
            _ => {
                new.push('%');
                rest = after;
            }
        }
    }
    new + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "sk-selam-k3y";

    fn sent(base: &str, uri: &str) -> Sent {
        Sent {
            base: Arc::new(Url::parse(base).unwrap()),
            uri: uri.parse().unwrap(),
            credentials: [
                Some(HeaderValue::from_static("Bearer a.b+/.c")),
                Some(HeaderValue::from_static(KEY)),
            ],
        }
    }

    fn rewritten(base: &str, name: &HeaderName, value: &str) -> Vec<String> {
        let mut headers = HeaderMap::new();
        headers.insert(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        sent(base, &format!("{}/files/7?x=1", base.trim_end_matches('/'))).rewrite(&mut headers);
        headers
            .get_all(name)
            .iter()
            .map(|value| String::from_utf8(value.as_bytes().to_vec()).unwrap())
            .collect()
    }

    #[test]
    fn locations_below_the_base_stay_on_the_proxy() {
        for (base, location, expected) in [
            ("https://api.selamgpt.com/v1", "https://api.selamgpt.com/v1/files/8", "/v1/files/8"),
            ("https://api.selamgpt.com/v1", "http://api.selamgpt.com/v1/files/8?a=b#c", "/v1/files/8?a=b#c"),
            ("https://api.selamgpt.com/v1", "HTTPS://API.SelamGPT.com:443/v1", "/v1"),
            ("https://api.selamgpt.com/v1", "http://api.selamgpt.com:80/v1/", "/v1/"),
            ("https://api.selamgpt.com/v1", "http://api.selamgpt.com:443/v1/x", "/v1/x"),
            ("https://api.selamgpt.com/v1", "https://api.selamgpt.com./v1/x", "/v1/x"),
            ("https://api.selamgpt.com/v1", "https://user:pw@api.selamgpt.com/v1/x", "/v1/x"),
            ("https://api.selamgpt.com/v1", "//api.selamgpt.com/v1/x", "/v1/x"),
            ("https://api.selamgpt.com/v1", "\\\\api.selamgpt.com\\v1\\x", "/v1/x"),
            ("https://api.selamgpt.com/v1", "https:/\\api.selamgpt.com/v1/x", "/v1/x"),
            ("https://api.selamgpt.com/v1", "https:///api.selamgpt.com/v1/x", "/v1/x"),
            ("https://api.selamgpt.com/v1", " https://api.selamgpt.com/v1/x ", "/v1/x"),
            ("https://api.selamgpt.com/v1", "https://api.selam\tgpt.com/v1/x", "/v1/x"),
            ("https://api.selamgpt.com/v1", "https://api%2Eselamgpt.com/v1/x", "/v1/x"),
            ("https://api.selamgpt.com/v1", "https://api.selamgpt.com/%761/x", "/v1/x"),
            ("https://api.selamgpt.com/v1", "https://api.selamgpt.com/v2/../v1/x", "/v1/x"),
            ("https://api.selamgpt.com/v1", "wss://api.selamgpt.com/v1/x", "/v1/x"),
            (
                "https://api.selamgpt.com/v1",
                "https://api.selamgpt.com/v1//evil.example/x",
                "/v1//evil.example/x",
            ),
            ("https://api.selamgpt.com/v1", "/v1/files/8", "/v1/files/8"),
            ("https://api.selamgpt.com/v1", "8", "/v1/files/8"),
            ("https://api.selamgpt.com/v1", "?page=2", "/v1/files/7?page=2"),
            ("https://api.selamgpt.com/v1", "#part", "/v1/files/7?x=1#part"),
            ("https://localhost:8443/gateway/v2/", "/gateway/v2/files/8", "/v1/files/8"),
            ("https://localhost:8443/gateway/v2/", "http://localhost:8443/gateway/v2/files/8", "/v1/files/8"),
            ("https://localhost:8443/gateway/v2/", "../models", "/v1/models"),
            ("https://localhost:8443/", "/files/8", "/v1/files/8"),
            ("https://localhost:8443", "//localhost:8443//evil.example", "/v1//evil.example"),
            ("http://127.0.0.1:1/v1", "http://127.1:1/v1/x", "/v1/x"),
            ("http://[::1]:1/v1", "http://[0:0::1]:1/v1/x", "/v1/x"),
            // Credentials are removed, also those of others.
            ("https://api.selamgpt.com/v1", "/v1/x?token=a&y=1&API-Key=b", "/v1/x?y=1"),
            ("https://api.selamgpt.com/v1", "/v1/x?%74oken=a", "/v1/x"),
            ("https://api.selamgpt.com/v1", "/v1/x?echo=sk%2Dselam%252Dk3y&y", "/v1/x?y"),
        ] {
            assert_eq!(rewritten(base, &LOCATION, location), [expected], "{base} {location}");
            assert_eq!(rewritten(base, &CONTENT_LOCATION, location), [expected], "{base} {location}");
            let refresh = format!("0; URL={location}");
            let expected = format!("0; URL={expected}");
            assert_eq!(rewritten(base, &REFRESH, &refresh), [expected], "{base} {refresh}");
        }
    }

    #[test]
    fn locations_elsewhere_stay() {
        for location in [
            "https://elsewhere.example/v1/files?token=signed&api_key=theirs",
            "https://api.selamgpt.com.evil.example/v1/x",
            "https://api.selamgpt.com@evil.example/v1/x",
            "https://evil.example/https://api.selamgpt.com/v1/x",
            "https://api.selamgpt.com:8443/v1/x",
            "http://api.selamgpt.com:8080/v1/x",
            "https://other.selamgpt.com/v1/x",
            "https://api.selamgpt.com/v2/x",
            "https://api.selamgpt.com/v1x",
            "https://api.selamgpt.com/v1/../admin",
            "//evil.example/v1/x",
            "/login",
            "/V1/x",
            "mailto:support@selamgpt.com",
            "ftp://api.selamgpt.com/v1/x",
            "https://[/v1",
            "http://",
        ] {
            assert_eq!(rewritten("https://api.selamgpt.com/v1", &LOCATION, location), [location]);
        }
    }

    #[test]
    fn no_location_has_our_credentials() {
        for (location, expected) in [
            ("https://elsewhere.example/?a=1&k=sk-selam-k3y", &["https://elsewhere.example/?a=1"][..]),
            ("https://elsewhere.example/?next=%2F%3Fk%3Dsk%252Dselam-k3y", &["https://elsewhere.example/"]),
            ("https://elsewhere.example/?t=a.b%2B%2F.c", &["https://elsewhere.example/"]),
            ("https://elsewhere.example/sk-selam-k3y", &[]),
            ("/v1/sk-selam-k3y", &[]),
            ("https://sk-selam-k3y@elsewhere.example/", &[]),
            ("https://elsewhere.example/#sk-selam-k3y", &[]),
        ] {
            assert_eq!(rewritten("https://api.selamgpt.com/v1", &LOCATION, location), expected, "{location}");
        }
        // Those of the voice agent are in the query.
        let uri = "https://api.selamgpt.com/v1/audio/agent?voice=x&token=j.w%2Bt&api_key=k3";
        let mut headers = HeaderMap::new();
        headers.insert(LOCATION, "https://elsewhere.example/?a=j.w%2bt&b=k3&voice=x".parse().unwrap());
        Sent { credentials: [None, None], ..sent("https://api.selamgpt.com/v1", uri) }.rewrite(&mut headers);
        assert_eq!(headers[LOCATION], "https://elsewhere.example/?voice=x");
    }

    #[test]
    fn every_target_of_a_link_is_rewritten() {
        let links = "<https://api.selamgpt.com/v1/files?after=8>; rel=\"next\", </v1/files>; rel=first, <https://a.example/>; rel=x";
        let expected =
            "</v1/files?after=8>; rel=\"next\", </v1/files>; rel=first, <https://a.example/>; rel=x";
        assert_eq!(rewritten("https://api.selamgpt.com/v1", &LINK, links), [expected]);
        for link in ["<https://a.example/>; rel=x", "<", "no link", "<a", ""] {
            assert_eq!(rewritten("https://api.selamgpt.com/v1", &LINK, link), [link]);
        }
        for (refresh, expected) in [
            ("0; https://api.selamgpt.com/v1/x", "0; /v1/x"),
            ("0, https://api.selamgpt.com/v1/x", "0, /v1/x"),
            ("0 https://api.selamgpt.com/v1/x", "0 /v1/x"),
            ("0 ; https://api.selamgpt.com/v1/x", "0 ; /v1/x"),
            ("0.5;;URL = 'https://api.selamgpt.com/v1/x' y", "0.5;;URL =/v1/x"),
            ("0; \"https://api.selamgpt.com/v1/x", "0; /v1/x"),
            ("0; https://api.selamgpt.com/v1/url=x", "0; /v1/url=x"),
        ] {
            assert_eq!(rewritten("https://api.selamgpt.com/v1", &REFRESH, refresh), [expected], "{refresh}");
        }
        for refresh in [
            "5",
            "5; url=",
            "",
            "5;",
            "5; url=https://elsewhere.example/",
            "5; https://elsewhere.example/?url=/v1/x",
        ] {
            assert_eq!(rewritten("https://api.selamgpt.com/v1", &REFRESH, refresh), [refresh]);
        }
    }
}
