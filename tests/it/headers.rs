//! Tests of which credential headers are sent, and which inbound ones are kept.

use http::{HeaderName, Request, Response, header::AUTHORIZATION};
use tower::{Layer, ServiceBuilder, ServiceExt};
use tower_http::follow_redirect::FollowRedirectLayer;
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthError, AuthErrorKind, Credentials, Error, JwtLayer, Origins, RequestAuth,
    SelamLayer, Token,
};

use tower_test::mock;

use crate::support::{Body, JWT, KEY, MODELS, bring_theirs, get, jwt, key, response, send, values};

const NONE: [&str; 0] = [];

fn choosing(choice: RequestAuth) -> Request<()> {
    let mut request = get(MODELS);
    request.extensions_mut().insert(choice);
    request
}

fn with_inbound_credentials() -> Request<()> {
    let mut request = get(MODELS);
    bring_theirs(&mut request);
    request
}

fn bearer(secret: &str) -> Vec<String> {
    vec![format!("Bearer {secret}")]
}

#[track_caller]
fn assert_sent(request: &Request<()>, authorization: &[String], x_api_key: &[&str]) {
    assert_eq!(values(request, "authorization"), authorization, "authorization");
    assert_eq!(values(request, "x-api-key"), x_api_key, "x-api-key");
}

/// H1: a key alone is sent as one `Authorization: Bearer`, without `X-API-Key`.
#[tokio::test]
async fn key_alone_is_sent_as_bearer() {
    let sent = send(&ApiKeyLayer::bearer(key()), get(MODELS)).await.unwrap();
    assert_sent(&sent, &bearer(KEY), &NONE);
    let selam = SelamLayer::builder().with_api_key(key()).build().unwrap();
    assert_sent(&send(&selam, get(MODELS)).await.unwrap(), &bearer(KEY), &NONE);
}

/// H1: the JWT is the one bearer, and the key the one `X-API-Key`.
#[tokio::test]
async fn key_and_jwt_use_one_header_each() {
    let sent = send(&(JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key())), get(MODELS)).await.unwrap();
    assert_sent(&sent, &bearer(JWT), &[KEY]);
    let selam = SelamLayer::builder().with_api_key(key()).with_jwt(jwt()).build().unwrap();
    assert_sent(&send(&selam, get(MODELS)).await.unwrap(), &bearer(JWT), &[KEY]);
}

/// H1: a key in `X-API-Key` is sent without `Authorization`.
#[tokio::test]
async fn x_api_key_is_sent_alone() {
    let sent = send(&ApiKeyLayer::x_api_key(key()), get(MODELS)).await.unwrap();
    assert_sent(&sent, &[], &[KEY]);
}

/// H0, H1: each layer writes its own header, whichever is outermost.
#[tokio::test]
async fn key_and_jwt_layers_compose_in_either_order() {
    let (jwt, key) = (JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key()));
    let orders = (
        ServiceBuilder::new().layer(jwt.clone()).layer(key.clone()).into_inner(),
        ServiceBuilder::new().layer(key).layer(jwt).into_inner(),
    );
    for request in [get(MODELS), with_inbound_credentials(), choosing(RequestAuth::ApiKeyAndJwt)] {
        assert_sent(&send(&orders.0, request.clone()).await.unwrap(), &bearer(JWT), &[KEY]);
        assert_sent(&send(&orders.1, request).await.unwrap(), &bearer(JWT), &[KEY]);
    }
    let custom = RequestAuth::Custom(Credentials::x_api_key(ApiKey::new("sk-selam-other").unwrap()));
    for (choice, authorization, x_api_key) in [
        (RequestAuth::ApiKey, vec![], vec![KEY]),
        (RequestAuth::Anonymous, vec![], vec![]),
        (custom, vec![], vec!["sk-selam-other"]),
    ] {
        let mut request = with_inbound_credentials();
        request.extensions_mut().insert(choice.clone());
        for sent in [send(&orders.0, request.clone()).await, send(&orders.1, request).await] {
            assert_sent(&sent.unwrap(), &authorization, &x_api_key);
        }
    }
}

/// H0: a layer leaves the header that it does not own, sensitive or not.
#[tokio::test]
async fn headers_of_others_are_kept() {
    let inbound: [String; 2] = ["Bearer theirs".into(), "Basic dGhlaXJz".into()];
    let inbound_key = ["theirs", "theirs too"];
    for is_sensitive in [false, true] {
        let mut request = with_inbound_credentials();
        request.headers_mut().values_mut().for_each(|value| value.set_sensitive(is_sensitive));
        for choice in [None, Some(RequestAuth::ApiKey), Some(RequestAuth::Anonymous)] {
            let (bearer_key, bearer_jwt, own_key) = match choice {
                None => (bearer(KEY), bearer(JWT), vec![KEY]),
                Some(RequestAuth::ApiKey) => (bearer(KEY), vec![], vec![KEY]),
                _ => (vec![], vec![], vec![]),
            };
            let mut request = request.clone();
            request.extensions_mut().extend(
                choice
                    .map(|choice| {
                        let mut extensions = http::Extensions::new();
                        extensions.insert(choice);
                        extensions
                    })
                    .unwrap_or_default(),
            );
            let sent = send(&ApiKeyLayer::bearer(key()), request.clone()).await.unwrap();
            assert_sent(&sent, &bearer_key, &inbound_key);
            let sent = send(&JwtLayer::new(jwt()), request.clone()).await.unwrap();
            assert_sent(&sent, &bearer_jwt, &inbound_key);
            let sent = send(&ApiKeyLayer::x_api_key(key()), request).await.unwrap();
            assert_sent(&sent, &inbound, &own_key);
        }
    }
}

/// H0: of two layers that own the same header, the inner one wins.
#[tokio::test]
async fn inner_layer_wins_a_shared_header() {
    let jwt = JwtLayer::new(jwt());
    let inside = ServiceBuilder::new().layer(jwt.clone()).layer(ApiKeyLayer::bearer(key())).into_inner();
    assert_sent(&send(&inside, get(MODELS)).await.unwrap(), &bearer(KEY), &NONE);
    let inside = ServiceBuilder::new().layer(ApiKeyLayer::bearer(key())).layer(jwt).into_inner();
    assert_sent(&send(&inside, get(MODELS)).await.unwrap(), &bearer(JWT), &NONE);
}

/// H0, H3: the stack owns both headers.
#[tokio::test]
async fn the_stack_replaces_both_headers() {
    let selam = SelamLayer::builder().with_api_key(key());
    let sent = send(&selam.clone().build().unwrap(), with_inbound_credentials()).await.unwrap();
    assert_sent(&sent, &bearer(KEY), &NONE);
    let sent = send(&selam.with_jwt(jwt()).build().unwrap(), with_inbound_credentials()).await.unwrap();
    assert_sent(&sent, &bearer(JWT), &[KEY]);
    let mut request = with_inbound_credentials();
    request.extensions_mut().insert(RequestAuth::Custom(Credentials::x_api_key(key())));
    assert_sent(&send(&ApiKeyLayer::per_request(), request).await.unwrap(), &[], &[KEY]);
}

/// H6: `TRACE` and `CONNECT` carry no credentials, in headers or in the query.
#[tokio::test]
async fn trace_and_connect_are_refused() {
    let custom = RequestAuth::Custom(Credentials::bearer(key()));
    for method in ["TRACE", "CONNECT", "trace", "Connect", "TRACK"] {
        let method = http::Method::from_bytes(method.as_bytes()).unwrap();
        for choice in [None, Some(RequestAuth::ApiKey), Some(RequestAuth::VoiceAgent), Some(custom.clone())] {
            let mut request = get(MODELS);
            *request.method_mut() = method.clone();
            if let Some(choice) = choice {
                request.extensions_mut().insert(choice);
            }
            let selam = SelamLayer::builder().with_api_key(key()).with_jwt(jwt()).build().unwrap();
            let (mut parts, ()) = request.clone().into_parts();
            let imperative = selam.authorize(&mut parts).await.map(|_| ());
            assert!(parts.headers.is_empty() && parts.uri.query().is_none());
            for refused in [
                send(&selam, request.clone()).await.unwrap_err(),
                send(&ApiKeyLayer::bearer(key()).if_not_present(), request.clone()).await.unwrap_err(),
                send(&ApiKeyLayer::x_api_key(key()), request.clone()).await.unwrap_err(),
                send(&JwtLayer::new(jwt()), request.clone()).await.unwrap_err(),
                imperative.unwrap_err(),
            ] {
                assert_eq!(refused.kind(), AuthErrorKind::InvalidRequest);
                assert!(refused.to_string().contains(method.as_str()), "{refused}");
            }
        }
        // Without credentials they pass: stripped, or because the request asks for none.
        let mut request = with_inbound_credentials();
        *request.method_mut() = method;
        *request.uri_mut() = "https://elsewhere.example/".parse().unwrap();
        let strip = ApiKeyLayer::bearer(key()).with_origins(Origins::selam().strip_for_other_origins());
        let sent = send(&strip, request.clone()).await.unwrap();
        assert!(!sent.headers().contains_key(AUTHORIZATION));
        request.extensions_mut().insert(RequestAuth::Anonymous);
        assert!(send(&ApiKeyLayer::bearer(key()), request).await.is_ok());
    }
}

/// H2: every value is marked sensitive, on every path.
#[tokio::test]
async fn every_credential_value_is_sensitive() {
    let layers = (
        ApiKeyLayer::bearer(key()),
        ApiKeyLayer::x_api_key(key()),
        (JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key())),
        ServiceBuilder::new().layer(JwtLayer::new(jwt())).layer(ApiKeyLayer::x_api_key(key())).into_inner(),
    );
    let custom = choosing(RequestAuth::Custom(Credentials::key_and_jwt(key(), jwt())));
    let sent = send(&ApiKeyLayer::per_request(), custom).await.unwrap();
    assert!(sent.headers().values().all(|value| value.is_sensitive()));
    for request in [get(MODELS), choosing(RequestAuth::ApiKey)] {
        for sent in [
            send(&layers.0, request.clone()).await,
            send(&layers.1, request.clone()).await,
            send(&layers.2, request.clone()).await,
            send(&layers.3, request.clone()).await,
        ] {
            let sent = sent.unwrap();
            assert!(!sent.headers().is_empty());
            assert!(sent.headers().values().all(|value| value.is_sensitive()), "{:?}", sent.headers().keys());
        }
    }
}

/// H3: inbound credentials are replaced, duplicates included.
#[tokio::test]
async fn inbound_credentials_are_replaced() {
    let sent = send(&ApiKeyLayer::bearer(key()), with_inbound_credentials()).await.unwrap();
    assert_eq!(values(&sent, "authorization"), bearer(KEY));
    let sent = send(&ApiKeyLayer::x_api_key(key()), with_inbound_credentials()).await.unwrap();
    assert_eq!(values(&sent, "x-api-key"), [KEY]);
    let sent = send(&(JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key())), with_inbound_credentials())
        .await
        .unwrap();
    assert_sent(&sent, &bearer(JWT), &[KEY]);
}

/// H3: `if_not_present` keeps inbound credentials and relaxes nothing else.
#[tokio::test]
async fn if_not_present_keeps_inbound_credentials() {
    let inbound: [String; 2] = ["Bearer theirs".into(), "Basic dGhlaXJz".into()];
    let sent = send(&ApiKeyLayer::bearer(key()).if_not_present(), with_inbound_credentials()).await.unwrap();
    assert_sent(&sent, &inbound, &["theirs", "theirs too"]);
    assert_sent(
        &send(&ApiKeyLayer::bearer(key()).if_not_present(), get(MODELS)).await.unwrap(),
        &bearer(KEY),
        &NONE,
    );

    // A layer that owns both headers writes neither if one is present; a layer that owns one looks at that one.
    let mut request = get(MODELS);
    request.headers_mut().insert("x-api-key", "theirs".parse().unwrap());
    let selam = SelamLayer::builder().with_api_key(key()).with_jwt(jwt()).if_not_present().build().unwrap();
    assert_sent(&send(&selam, request.clone()).await.unwrap(), &[], &["theirs"]);
    let (jwt_layer, key_layer) =
        (JwtLayer::new(jwt()).if_not_present(), ApiKeyLayer::x_api_key(key()).if_not_present());
    let pair = ServiceBuilder::new().layer(jwt_layer.clone()).layer(key_layer.clone()).into_inner();
    assert_sent(&send(&pair, request.clone()).await.unwrap(), &bearer(JWT), &["theirs"]);
    let pair = ServiceBuilder::new().layer(key_layer).layer(jwt_layer).into_inner();
    assert_sent(&send(&pair, request).await.unwrap(), &bearer(JWT), &["theirs"]);

    // The origin check is unchanged.
    let mut elsewhere = with_inbound_credentials();
    *elsewhere.uri_mut() = "https://evil.com/".parse().unwrap();
    let refused = send(&ApiKeyLayer::bearer(key()).if_not_present(), elsewhere.clone()).await.unwrap_err();
    assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed);
    let pass =
        ApiKeyLayer::bearer(key()).if_not_present().with_origins(Origins::selam().strip_for_other_origins());
    assert_sent(&send(&pass, elsewhere).await.unwrap(), &[], &["theirs", "theirs too"]);
}

/// H3: a hop-by-hop `Connection: authorization` does not remove our headers.
#[tokio::test]
async fn connection_header_cannot_remove_credentials() {
    for (connection, kept) in [
        (&["Authorization, X-Api-Key"][..], &[][..]),
        (&["keep-alive,authorization , upgrade"], &["keep-alive, upgrade"]),
        (&["close", "x-api-key", ", AUTHORIZATION,"], &["close"]),
        (&["keep-alive", "upgrade"], &["keep-alive", "upgrade"]),
        (&["authorizations"], &["authorizations"]),
    ] {
        let mut request = get(MODELS);
        for value in connection {
            request.headers_mut().append("connection", value.parse().unwrap());
        }
        let sent = send(&(JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key())), request).await.unwrap();
        assert_sent(&sent, &bearer(JWT), &[KEY]);
        assert_eq!(values(&sent, "connection"), kept, "{connection:?}");
    }
}

/// H4: the `RequestAuth` extension selects the credentials of one request and does not leak into the next.
#[tokio::test]
async fn request_auth_selects_the_credentials() {
    let both = SelamLayer::builder().with_api_key(key()).with_jwt(jwt()).build().unwrap();
    let other =
        Credentials::key_and_jwt(ApiKey::new("sk-selam-other").unwrap(), Token::new("a.b.c").unwrap());
    for (choice, authorization, x_api_key) in [
        (RequestAuth::ApiKey, bearer(KEY), vec![]),
        (RequestAuth::ApiKeyAndJwt, bearer(JWT), vec![KEY]),
        (RequestAuth::Anonymous, vec![], vec![]),
        (RequestAuth::Custom(other), bearer("a.b.c"), vec!["sk-selam-other"]),
    ] {
        let mut request = with_inbound_credentials();
        request.extensions_mut().insert(choice);
        assert_sent(&send(&both, request).await.unwrap(), &authorization, &x_api_key);
        // The next request carries the layer's own credentials.
        assert_sent(&send(&both, get(MODELS)).await.unwrap(), &bearer(JWT), &[KEY]);
    }
    // A layer writes what it owns of custom credentials.
    let other = || ApiKey::new("sk-selam-other").unwrap();
    let pair = (JwtLayer::new(jwt()), ApiKeyLayer::x_api_key(key()));
    for (custom, authorization, x_api_key) in [
        (
            Credentials::key_and_jwt(other(), Token::new("a.b.c").unwrap()),
            bearer("a.b.c"),
            vec!["sk-selam-other"],
        ),
        (Credentials::x_api_key(other()), vec![], vec!["sk-selam-other"]),
    ] {
        let sent = send(&pair, choosing(RequestAuth::Custom(custom))).await.unwrap();
        assert_sent(&sent, &authorization, &x_api_key);
    }
    let custom = choosing(RequestAuth::Custom(Credentials::bearer(other())));
    assert_sent(&send(&ApiKeyLayer::bearer(key()), custom).await.unwrap(), &bearer("sk-selam-other"), &NONE);
}

/// H4: a request whose choice the layer cannot satisfy is refused before it is sent.
#[tokio::test]
async fn unavailable_credential_is_refused() {
    let custom = RequestAuth::Custom;
    for (layer, choice) in [
        (ApiKeyLayer::bearer(key()), RequestAuth::ApiKeyAndJwt),
        // What goes into a header that the layer does not own cannot be sent.
        (ApiKeyLayer::bearer(key()), custom(Credentials::key_and_jwt(key(), jwt()))),
        (ApiKeyLayer::bearer(key()), custom(Credentials::x_api_key(key()))),
        (ApiKeyLayer::x_api_key(key()), custom(Credentials::bearer(key()))),
        (ApiKeyLayer::bearer(key()), RequestAuth::VoiceAgent),
        (ApiKeyLayer::per_request(), RequestAuth::ApiKey),
        (ApiKeyLayer::per_request(), RequestAuth::ApiKeyAndJwt),
        (ApiKeyLayer::per_request(), RequestAuth::VoiceAgent),
    ] {
        let refused = send(&layer, choosing(choice.clone())).await.unwrap_err();
        assert_eq!(refused.kind(), AuthErrorKind::CredentialUnavailable, "{choice:?}");
        assert_eq!((refused.status(), refused.is_auth()), (None, false));
    }
    // Custom credentials are restricted to allowed origins as well.
    let mut request = choosing(RequestAuth::Custom(Credentials::bearer(key())));
    *request.uri_mut() = "https://evil.com/".parse().unwrap();
    let refused = send(&ApiKeyLayer::per_request(), request).await.unwrap_err();
    assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed);
}

/// H4: a redirect that drops the `RequestAuth` extension fails closed.
#[tokio::test]
async fn redirect_without_request_auth_fails_closed() {
    let custom = RequestAuth::Custom(Credentials::bearer(ApiKey::new("sk-selam-tenant").unwrap()));
    let selam = SelamLayer::builder().with_api_key(key()).require_request_auth().build().unwrap();
    let selam = ServiceBuilder::new().map_err(Error::into_boxed).layer(selam).into_inner();

    macro_rules! fails_closed {
        ($layer:expr) => {{
            let (mock, mut handle) = mock::pair::<Request<Body>, Response<Body>>();
            let client = FollowRedirectLayer::new().preserve_extensions(false).layer($layer.layer(mock));
            let api = async {
                let (request, send) = handle.next_request().await.unwrap();
                let mut redirect = response(307, "");
                redirect.headers_mut().insert("location", "/v1/elsewhere".parse().unwrap());
                send.send_response(redirect);
                (request, handle.next_request().await.is_some())
            };
            let (result, (first, second)) =
                tokio::join!(client.oneshot(choosing(custom.clone()).map(|()| Body::default())), api);
            assert_sent(&first.map(|_| ()), &bearer("sk-selam-tenant"), &NONE);
            assert!(!second, "the redirected request must not be sent");
            let error = result.unwrap_err();
            let error = AuthError::find(&*error).unwrap();
            assert_eq!(error.kind(), AuthErrorKind::CredentialUnavailable);
        }};
    }
    fails_closed!(ApiKeyLayer::per_request());
    fails_closed!(ApiKeyLayer::bearer(key()).require_request_auth());
    fails_closed!(selam);
}

/// H4, O4: a redirect to another origin and back does not fall back to the layer's credentials.
#[tokio::test]
async fn redirect_away_and_back_fails_closed() {
    let custom = RequestAuth::Custom(Credentials::bearer(ApiKey::new("sk-selam-tenant").unwrap()));
    let layer = ApiKeyLayer::bearer(key())
        .require_request_auth()
        .with_origins(Origins::selam().strip_for_other_origins());
    let (mock, mut handle) = mock::pair::<Request<Body>, Response<Body>>();
    let client = FollowRedirectLayer::new().layer(layer.layer(mock));
    let api = async {
        let mut sent = Vec::new();
        let mut locations = ["https://evil.com/", MODELS].into_iter();
        while let Some((request, send)) = handle.next_request().await {
            sent.push((request.uri().host().unwrap().to_owned(), request.headers().len()));
            let mut redirect = response(307, "");
            redirect.headers_mut().insert("location", locations.next().unwrap().parse().unwrap());
            send.send_response(redirect);
        }
        sent
    };
    let (result, sent) = tokio::join!(client.oneshot(choosing(custom).map(|()| Body::default())), api);
    assert_eq!(sent, [("api.selamgpt.com".to_owned(), 1), ("evil.com".to_owned(), 0)]);
    let error = AuthError::find(&*result.unwrap_err()).unwrap().kind();
    assert_eq!(error, AuthErrorKind::CredentialUnavailable);
}

/// H4: an explicit `RequestAuth` wins over inbound headers, even with `if_not_present`.
#[tokio::test]
async fn request_auth_overrides_if_not_present() {
    let mut request = with_inbound_credentials();
    request.extensions_mut().insert(RequestAuth::ApiKey);
    let sent = send(&ApiKeyLayer::bearer(key()).if_not_present(), request).await.unwrap();
    assert_eq!(values(&sent, "authorization"), bearer(KEY));
}

/// O1: the JWT layer checks the origin even if the key layer writes the only credential.
#[tokio::test]
async fn jwt_layer_checks_the_origin() {
    let mut request = choosing(RequestAuth::ApiKey);
    *request.uri_mut() = "http://api.selamgpt.com/".parse().unwrap();
    let refused = send(&JwtLayer::new(jwt()), request).await.unwrap_err();
    assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed);
}

#[tokio::test]
async fn full_header_map_is_a_typed_error() {
    let mut request = get(MODELS);
    let mut filled = 0;
    let name = |number| format!("x-{number}").parse::<HeaderName>().unwrap();
    while request.headers_mut().try_append(name(filled), "1".parse().unwrap()).is_ok() {
        filled += 1;
    }
    let refused = send(&ApiKeyLayer::bearer(key()), request).await.unwrap_err();
    assert_eq!(refused.kind(), AuthErrorKind::InvalidRequest);
    assert!(filled > 10_000);
}
