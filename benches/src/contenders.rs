//! The contenders: the floors, each layer, the whole stack, and what programs write without this crate.

use std::{
    sync::{Arc, Mutex, RwLock},
    time::Instant,
};

use futures_util::TryFutureExt;
use http::{
    HeaderName, HeaderValue, Request, StatusCode,
    header::{AUTHORIZATION, CONNECTION, HOST},
};
use tokio::runtime::Runtime;
use tower::{Layer, Service, ServiceBuilder, service_fn};
use tower_http::set_header::SetRequestHeaderLayer;
use tower_selam::{AuthErrorLayer, RefreshLayer};

use crate::{
    layers::{
        HOUR, fixed_jwt, fixed_key, fleet_jwt, jwt_and_key_layers, key_layer, refreshing_jwt, refreshing_key,
        selam_with_jwt, selam_with_key,
    },
    requests::{Body, JWT, KEY, client, sensitive},
    serve::{Serve, serve},
};

pub const BARE: &str = "bare service";
pub const ONE_HEADER: &str = "by hand, 1 header";
pub const TWO_HEADERS: &str = "by hand, 2 headers";
pub const BYTES_PER_CLONE: &str = "by hand, bytes copied per clone";

/// Limits of the whole stack's time, as multiples of the floor's.
const FIXED: f64 = 1.15;
const REFRESHING: f64 = 2.0;

static X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// One row of a table.
pub struct Contender {
    pub name: &'static str,
    /// The contender that this one is compared with.
    pub floor: &'static str,
    /// Whether this crate provides it.
    pub is_ours: bool,
    /// Whether it keeps a copy of each request, to replay it after a 401.
    pub keeps_request: bool,
    /// The most it may cost in time, as a multiple of its floor.
    pub time_limit: Option<f64>,
    pub service: Box<dyn Serve>,
}

impl Contender {
    fn new<S>(name: &'static str, floor: &'static str, service: S) -> Self
    where
        S: Service<Request<Body>> + Clone + Send + 'static,
    {
        let service = serve(service);
        Self { name, floor, is_ours: false, keeps_request: false, time_limit: None, service }
    }

    fn ours(self) -> Self {
        Self { is_ours: true, ..self }
    }

    fn keeps_request(self) -> Self {
        Self { keeps_request: true, ..self }
    }

    fn time_limit(self, limit: f64) -> Self {
        Self { time_limit: Some(limit), ..self }
    }
}

/// Returns the index of a contender.
///
/// # Panics
///
/// If no contender has that name.
#[must_use]
pub fn position(contenders: &[Contender], name: &str) -> usize {
    contenders.iter().position(|contender| contender.name == name).expect("a contender has that name")
}

/// All contenders, each floor before the rows that are compared with it.
pub fn contenders(runtime: &Runtime) -> Vec<Contender> {
    let _entered = runtime.enter();
    let bare = service_fn(client);
    // Each contender gets its own engine.
    let (keys, jwts) = (|| refreshing_key(runtime), || refreshing_jwt(runtime));
    let bearer_key = sensitive(&format!("Bearer {KEY}"));
    let headers = Headers::new();
    let set = |name, value: &HeaderValue| SetRequestHeaderLayer::overriding(name, value.clone());
    let one_header = {
        let bearer = bearer_key.clone();
        by_hand(move |request| {
            request.headers_mut().insert(AUTHORIZATION, bearer.clone());
        })
    };
    let two_headers = {
        let headers = headers.clone();
        by_hand(move |request| headers.write(request))
    };
    let bytes_per_clone = {
        let headers = BytesPerClone(headers.clone());
        by_hand(move |request| {
            let BytesPerClone(headers) = &headers;
            headers.write(request);
        })
    };
    let two_set_headers = (set(AUTHORIZATION, &headers.bearer), set(X_API_KEY.clone(), &headers.key));
    let mutex = {
        let (token, key) =
            (Arc::new(Mutex::new((JWT.to_owned(), Instant::now() + HOUR))), headers.key.clone());
        by_hand(move |request| {
            let bearer = {
                let (jwt, expires_at) = &*token.lock().expect("the lock is not poisoned");
                assert!(*expires_at > Instant::now());
                sensitive(&format!("Bearer {jwt}"))
            };
            insert(request, bearer, key.clone());
        })
    };
    let rw_lock = {
        let token = Arc::new(RwLock::new((headers.bearer.clone(), Instant::now() + HOUR)));
        let key = headers.key.clone();
        by_hand(move |request| {
            let bearer = {
                let (bearer, expires_at) = &*token.read().expect("the lock is not poisoned");
                assert!(*expires_at > Instant::now());
                bearer.clone()
            };
            insert(request, bearer, key.clone());
        })
    };
    let headers = Arc::new(headers);
    let checked = checked(Arc::clone(&headers), false);
    let checked_and_kept = self::checked(headers, true);

    vec![
        Contender::new(BARE, BARE, bare),
        Contender::new("AuthErrorLayer", BARE, AuthErrorLayer::new().layer(bare)).ours(),
        Contender::new("RefreshLayer", BARE, RefreshLayer::new().layer(bare)).ours().keeps_request(),
        Contender::new(ONE_HEADER, ONE_HEADER, one_header),
        Contender::new("SetRequestHeaderLayer", ONE_HEADER, set(AUTHORIZATION, &bearer_key).layer(bare)),
        Contender::new("ApiKeyLayer, fixed", ONE_HEADER, key_layer(fixed_key()).layer(bare)).ours(),
        Contender::new("ApiKeyLayer, refreshing", ONE_HEADER, key_layer(keys()).layer(bare)).ours(),
        Contender::new("SelamLayer, key fixed", ONE_HEADER, selam_with_key(fixed_key()).layer(bare))
            .ours()
            .time_limit(FIXED),
        Contender::new("SelamLayer, key refreshing", ONE_HEADER, selam_with_key(keys()).layer(bare))
            .ours()
            .keeps_request()
            .time_limit(REFRESHING),
        Contender::new(TWO_HEADERS, TWO_HEADERS, two_headers),
        Contender::new(BYTES_PER_CLONE, TWO_HEADERS, bytes_per_clone),
        Contender::new("2 x SetRequestHeaderLayer", TWO_HEADERS, two_set_headers.layer(bare)),
        Contender::new("by hand, 2 headers, checked", TWO_HEADERS, checked),
        Contender::new("by hand, 2 headers, checked and kept", TWO_HEADERS, checked_and_kept),
        Contender::new("Mutex<Token> and format!", TWO_HEADERS, mutex),
        Contender::new("RwLock<HeaderValue>", TWO_HEADERS, rw_lock),
        Contender::new(
            "JwtLayer + ApiKeyLayer, fixed",
            TWO_HEADERS,
            jwt_and_key_layers(fixed_jwt(), fixed_key()).layer(bare),
        )
        .ours(),
        Contender::new(
            "JwtLayer + ApiKeyLayer, refreshing",
            TWO_HEADERS,
            jwt_and_key_layers(jwts(), keys()).layer(bare),
        )
        .ours(),
        Contender::new(
            "SelamLayer, JWT and key fixed",
            TWO_HEADERS,
            selam_with_jwt(fixed_jwt(), fixed_key()).layer(bare),
        )
        .ours()
        .time_limit(FIXED),
        Contender::new(
            "SelamLayer, JWT and key refreshing",
            TWO_HEADERS,
            selam_with_jwt(jwts(), keys()).layer(bare),
        )
        .ours()
        .keeps_request()
        .time_limit(REFRESHING),
        Contender::new(
            "SelamLayer, JWT of a fleet and key",
            TWO_HEADERS,
            selam_with_jwt(fleet_jwt(runtime), keys()).layer(bare),
        )
        .ours()
        .keeps_request()
        .time_limit(REFRESHING),
    ]
}

/// The bare service behind an edit of the request.
fn by_hand(
    edit: impl Fn(&mut Request<Body>) + Clone + Send + 'static,
) -> impl Service<Request<Body>> + Clone + Send + 'static {
    ServiceBuilder::new()
        .map_request(move |mut request| {
            edit(&mut request);
            request
        })
        .service_fn(client)
}

/// The headers of a request with a JWT and a key.
#[derive(Clone)]
struct Headers {
    bearer: HeaderValue,
    key: HeaderValue,
}

impl Headers {
    fn new() -> Self {
        Self { bearer: sensitive(&format!("Bearer {JWT}")), key: sensitive(KEY) }
    }

    fn write(&self, request: &mut Request<Body>) {
        insert(request, self.bearer.clone(), self.key.clone());
    }
}

fn insert(request: &mut Request<Body>, bearer: HeaderValue, key: HeaderValue) {
    request.headers_mut().insert(AUTHORIZATION, bearer);
    request.headers_mut().insert(X_API_KEY.clone(), key);
}

/// Headers whose bytes are copied by each clone, so that no two threads share their reference counts.
struct BytesPerClone(Headers);

impl Clone for BytesPerClone {
    fn clone(&self) -> Self {
        Self(Headers::new())
    }
}

/// Writes both headers by hand with the layers' precautions: checks the request's origin and the headers that could
/// change it, and attaches what was sent to a 401. With `keeps_request`, also clones the request for a replay.
fn checked(
    headers: Arc<Headers>,
    keeps_request: bool,
) -> impl Service<Request<Body>> + Clone + Send + 'static {
    service_fn(move |mut request: Request<Body>| {
        let uri = request.uri();
        assert_eq!(uri.scheme_str(), Some("https"));
        assert!(uri.authority().is_some_and(|authority| authority == "api.selamgpt.com"));
        assert!(!request.headers().keys().any(|name| name == HOST || name == CONNECTION));
        let kept = keeps_request.then(|| request.clone());
        headers.write(&mut request);
        let sent = Arc::clone(&headers);
        client(request).map_ok(move |mut response| {
            if response.status() == StatusCode::UNAUTHORIZED {
                response.extensions_mut().insert((sent, kept));
            }
            response
        })
    })
}
