//! Names of request headers, by family.
//!
//! Edges, load balancers and identity-aware proxies add headers faster than a list of names could follow, so they are
//! recognised by prefix, by word and by ending.

use http::{
    HeaderMap,
    header::{HeaderName, VIA},
};

/// Headers that a caller authenticates with, to whomever.
const CREDENTIALS: Family = Family {
    names: &[
        "api-key",
        "apikey",
        "authorization",
        "cookie",
        "cookie2",
        "dpop",
        "ocp-apim-subscription-key",
        // A CGI program would read it as the variable `HTTP_PROXY`.
        "proxy",
        "token",
        "x-apikey",
        "x-functions-key",
    ],
    prefixes: &[
        "proxy-",
        "x-api-secret",
        "x-auth-",
        "x-csrf-",
        "x-firebase-",
        "x-goog-api-key",
        "x-token-",
        "x-xsrf-",
    ],
    words: &[
        "auth",
        "authentication",
        "bearer",
        "credential",
        "credentials",
        "csrftoken",
        "jwt",
        "oidc",
        "password",
        "saml",
        "secret",
    ],
    endings: &["-access-key", "-api-key", "-authorization", "-client-secret", "-subscription-key", "-token"],
};

/// Headers that an edge, a load balancer, a tunnel or an identity-aware proxy adds: a request that has one did not come
/// straight from its caller.
const EDGE: Family = Family {
    names: &[
        "client-verify",
        "connect-time",
        "disguised-host",
        "front-end-https",
        "total-route-time",
        "was-default-hostname",
        "x-appservice-proto",
        "x-host",
        "x-https",
        "x-request-start",
        "x-rewrite-url",
        "x-scheme",
        "x-site-deployment-id",
        "x-url-scheme",
    ],
    prefixes: &[
        "akamai-",
        "ali-cdn-",
        "cdn-",
        "cf-",
        "client-cert",
        "cloudfront-",
        "do-connecting-",
        "eo-",
        "fastly-",
        "fly-",
        "forward",
        "geoip-",
        "incap-",
        "l5d-",
        "ngrok-",
        "oidc-",
        "remote-",
        "rndr-",
        "shib-",
        "ssl-",
        "tailscale-",
        "teleport-",
        "tencent-",
        "true-client-",
        "wl-proxy-",
        "x-accel-",
        "x-akamai-",
        "x-amz-cf-",
        "x-amzn-",
        "x-apigateway-",
        "x-apisix-",
        "x-appengine-",
        "x-arr-",
        "x-auth-request-",
        "x-authenticated-",
        "x-authentik-",
        "x-azure-",
        "x-bluecoat-",
        "x-cdn-",
        "x-client-addr",
        "x-client-cert",
        "x-client-dn",
        "x-client-geo-",
        "x-client-port",
        "x-client-tls",
        "x-client-verify",
        "x-cloudflare-",
        "x-cluster-",
        "x-edge-",
        "x-endpoint-api-",
        "x-envoy-",
        "x-fastly-",
        "x-fd-",
        "x-forward",
        "x-geo-",
        "x-geoip-",
        "x-goog-authenticated-",
        "x-goog-iap-",
        "x-haproxy-",
        "x-heroku-",
        "x-iap-",
        "x-imperva-",
        "x-incap-",
        "x-istio-",
        "x-ja3",
        "x-ja4",
        "x-kong-",
        "x-ms-client-principal",
        "x-ms-token-",
        "x-netlify-",
        "x-nf-",
        "x-nginx-",
        "x-ngrok-",
        "x-original-",
        "x-originating-",
        "x-pomerium-",
        "x-proxy",
        "x-railway-",
        "x-real-",
        "x-remote-",
        "x-render-",
        "x-shib-",
        "x-ssl-",
        "x-sucuri-",
        "x-tailscale-",
        "x-teleport-",
        "x-tencent-",
        "x-tls-",
        "x-traefik-",
        "x-true-",
        "x-up-",
        "x-varnish",
        "x-vercel-",
        "x-vouch-",
        "x-waws-",
        "x-webauth-",
        "x-zscaler-",
        "z-forwarded-",
    ],
    words: &["clientip", "forwarded", "imei", "imsi", "ip", "msisdn", "realip", "remoteip", "userinfo"],
    endings: &["-client-cert", "-client-dn", "-remote-addr"],
};

/// Headers that tell who the caller is or which web page it shows, and headers that override method, path or host.
const CALLER: Family = Family {
    names: &[
        "baggage",
        "from",
        "origin",
        "referer",
        "sec-browsing-topics",
        "x-anonymous-consumer",
        "x-country",
        "x-email",
        "x-groups",
        "x-http-destinationurl",
        "x-method-override",
        "x-preferred-username",
        "x-roles",
        "x-user",
        "x-username",
    ],
    prefixes: &[
        "impersonate-",
        "sec-ch-",
        "sec-fetch-",
        "x-account-",
        "x-consumer-",
        "x-country-",
        "x-credential-",
        "x-goog-",
        "x-hasura-",
        "x-http-host-",
        "x-http-method",
        "x-http-path-",
        "x-identity-",
        "x-ldap-",
        "x-ms-",
        "x-okta-",
        "x-principal-",
        "x-sso-",
        "x-subject-",
        "x-user-",
    ],
    words: &["email", "user", "userid", "username"],
    endings: &["-method-override"],
};

/// Headers that belong to a family by their names, and stay.
const KEPT: Family = Family {
    // RFC 8586 section 2 forbids to remove `CDN-Loop`, and a trace id tells nothing of the caller.
    names: &["cdn-loop", "user-agent", "x-amzn-trace-id", "x-user-agent"],
    prefixes: &["openai-", "x-stainless-"],
    words: &[],
    endings: &[],
};

/// Names that have something in common.
struct Family {
    names: &'static [&'static str],
    prefixes: &'static [&'static str],
    /// Found anywhere between hyphens.
    words: &'static [&'static str],
    endings: &'static [&'static str],
}

impl Family {
    fn contains(&self, name: &str) -> bool {
        self.names.iter().any(|known| is_name(name, known))
            || self.prefixes.iter().any(|prefix| starts_with(name, prefix))
            || self.endings.iter().any(|ending| ends_with(name, ending))
            || (!self.words.is_empty() && words(name).any(|word| self.words.contains(&word)))
    }
}

/// Whether a header with this name tells of the caller: its credentials, its network or its identity.
pub(super) fn tells_of_caller(name: &HeaderName) -> bool {
    let name = name.as_str();
    (CREDENTIALS.contains(name) || EDGE.contains(name) || CALLER.contains(name)) && !KEPT.contains(name)
}

/// Whether a request with these headers passed through an intermediary: a reverse proxy, a tunnel, an edge or a
/// load balancer. Each of them leaves `Via`, `Forwarded`, `X-Forwarded-*`, `CF-*` or another header of its kind.
///
/// A program that serves only callers on its own machine refuses such requests: somebody made it reachable from elsewhere.
///
/// ```
/// use http::{HeaderMap, HeaderValue};
/// use tower_selam::inbound::is_forwarded;
///
/// let mut headers = HeaderMap::new();
/// headers.insert("user-agent", HeaderValue::from_static("curl/8.5.0"));
/// assert!(!is_forwarded(&headers));
/// headers.insert("x-forwarded-proto", HeaderValue::from_static("https"));
/// assert!(is_forwarded(&headers));
/// ```
#[must_use]
pub fn is_forwarded(headers: &HeaderMap) -> bool {
    headers.keys().any(|name| *name == VIA || EDGE.contains(name.as_str()))
}

/// Compares like servers that pass headers on as variables, for which all punctuation equals `-`.
pub(super) fn is_name(name: &str, known: &str) -> bool {
    name.len() == known.len() && starts_with(name, known)
}

pub(super) fn starts_with(name: &str, prefix: &str) -> bool {
    name.len() >= prefix.len() && name.bytes().zip(prefix.bytes()).all(is_equal)
}

fn ends_with(name: &str, ending: &str) -> bool {
    name.len() >= ending.len() && name.bytes().rev().zip(ending.bytes().rev()).all(is_equal)
}

fn is_equal((byte, other): (u8, u8)) -> bool {
    fold(byte) == fold(other)
}

fn fold(byte: u8) -> u8 {
    if byte.is_ascii_alphanumeric() { byte.to_ascii_lowercase() } else { b'-' }
}

fn words(name: &str) -> impl Iterator<Item = &str> {
    name.split(|letter: char| !letter.is_ascii_alphanumeric())
}
