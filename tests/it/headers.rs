//! H1 to H4: which headers go out.

use http::{HeaderName, HeaderValue, Request, Response, header::AUTHORIZATION};
use tower::{Layer, ServiceBuilder, ServiceExt};
use tower_http::follow_redirect::FollowRedirectLayer;
use tower_selam::{
    ApiKey, ApiKeyLayer, AuthError, AuthErrorKind, Credentials, Error, JwtLayer, Origins, RequestAuth,
    SelamLayer, Token,
};

use tower_test::mock;

use crate::support::{Body, JWT, KEY, MODELS, bring_theirs, get, jwt, key, response, send, values};

const NONE: [&str; 0] = [];

fn with(choice: RequestAuth) -> Request<()> {
    let mut request = get(MODELS);
    request.extensions_mut().insert(choice);
    request
}

fn with_theirs() -> Request<()> {
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

#[tokio::test]
async fn h1_the_key_alone_is_one_bearer_and_no_x_api_key() {
    let sent = send(&ApiKeyLayer::bearer(key()), get(MODELS)).await.unwrap();
    assert_sent(&sent, &bearer(KEY), &NONE);
    let selam = SelamLayer::builder().with_api_key(key()).build().unwrap();
    assert_sent(&send(&selam, get(MODELS)).await.unwrap(), &bearer(KEY), &NONE);
}

#[tokio::test]
async fn h1_key_and_jwt_are_one_bearer_and_one_x_api_key() {
    let sent = send(&JwtLayer::new(jwt(), key()), get(MODELS)).await.unwrap();
    assert_sent(&sent, &bearer(JWT), &[KEY]);
    let selam = SelamLayer::builder().with_api_key(key()).with_jwt(jwt()).build().unwrap();
    assert_sent(&send(&selam, get(MODELS)).await.unwrap(), &bearer(JWT), &[KEY]);
}

#[tokio::test]
async fn h1_the_key_in_its_own_header_goes_alone() {
    let sent = send(&ApiKeyLayer::x_api_key(key()), get(MODELS)).await.unwrap();
    assert_sent(&sent, &[], &[KEY]);
}

#[tokio::test]
async fn h1_the_two_layers_compose_in_either_order() {
    let (jwt, key) = (JwtLayer::beside_api_key(jwt()), ApiKeyLayer::beside_jwt(key()));
    let orders = (
        ServiceBuilder::new().layer(jwt.clone()).layer(key.clone()).into_inner(),
        ServiceBuilder::new().layer(key).layer(jwt).into_inner(),
    );
    for request in [get(MODELS), with_theirs(), with(RequestAuth::ApiKeyAndJwt)] {
        assert_sent(&send(&orders.0, request.clone()).await.unwrap(), &bearer(JWT), &[KEY]);
        assert_sent(&send(&orders.1, request).await.unwrap(), &bearer(JWT), &[KEY]);
    }
    let own = RequestAuth::Custom(Credentials::x_api_key(ApiKey::new("sk-selam-other").unwrap()));
    for (choice, authorization, x_api_key) in [
        (RequestAuth::ApiKey, bearer(KEY), vec![]),
        (RequestAuth::Anonymous, vec![], vec![]),
        (own, vec![], vec!["sk-selam-other"]),
    ] {
        let mut request = with_theirs();
        request.extensions_mut().insert(choice.clone());
        for sent in [send(&orders.0, request.clone()).await, send(&orders.1, request).await] {
            assert_sent(&sent.unwrap(), &authorization, &x_api_key);
        }
    }
}

#[tokio::test]
async fn h3_a_half_without_the_other_forwards_nothing_of_its_callers() {
    let sent = send(&ApiKeyLayer::beside_jwt(key()), with_theirs()).await.unwrap();
    assert_sent(&sent, &[], &[KEY]);
    let sent = send(&JwtLayer::beside_api_key(jwt()), with_theirs()).await.unwrap();
    assert_sent(&sent, &bearer(JWT), &NONE);
    let mut request = with_theirs();
    request.extensions_mut().insert(RequestAuth::ApiKey);
    let sent = send(&JwtLayer::beside_api_key(jwt()), request).await.unwrap();
    assert_sent(&sent, &[], &NONE);
}

#[tokio::test]
async fn h1_a_layer_not_made_to_stand_beside_another_takes_all_or_nothing() {
    let jwt = JwtLayer::beside_api_key(jwt());
    let inside = ServiceBuilder::new().layer(jwt.clone()).layer(ApiKeyLayer::bearer(key())).into_inner();
    assert_sent(&send(&inside, with_theirs()).await.unwrap(), &bearer(KEY), &NONE);
    let inside = ServiceBuilder::new().layer(jwt).layer(ApiKeyLayer::x_api_key(key())).into_inner();
    assert_sent(&send(&inside, with_theirs()).await.unwrap(), &[], &[KEY]);
    let pair = JwtLayer::new(crate::support::jwt(), key());
    let inside = ServiceBuilder::new().layer(ApiKeyLayer::bearer(key())).layer(pair).into_inner();
    assert_sent(&send(&inside, with_theirs()).await.unwrap(), &bearer(JWT), &[KEY]);
}

#[tokio::test]
async fn h2_every_value_is_marked_sensitive() {
    let layers = (
        ApiKeyLayer::bearer(key()),
        ApiKeyLayer::x_api_key(key()),
        JwtLayer::new(jwt(), key()),
        ServiceBuilder::new()
            .layer(JwtLayer::beside_api_key(jwt()))
            .layer(ApiKeyLayer::beside_jwt(key()))
            .into_inner(),
    );
    let own = with(RequestAuth::Custom(Credentials::key_and_jwt(key(), jwt())));
    for request in [get(MODELS), own, with(RequestAuth::ApiKey)] {
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

#[tokio::test]
async fn h3_what_the_request_came_with_is_replaced_duplicates_included() {
    let sent = send(&ApiKeyLayer::bearer(key()), with_theirs()).await.unwrap();
    assert_sent(&sent, &bearer(KEY), &NONE);
    let sent = send(&ApiKeyLayer::x_api_key(key()), with_theirs()).await.unwrap();
    assert_sent(&sent, &[], &[KEY]);
    let sent = send(&JwtLayer::new(jwt(), key()), with_theirs()).await.unwrap();
    assert_sent(&sent, &bearer(JWT), &[KEY]);
}

#[tokio::test]
async fn h3_if_absent_keeps_what_the_request_came_with() {
    let theirs: [String; 2] = ["Bearer theirs".into(), "Basic dGhlaXJz".into()];
    let sent = send(&ApiKeyLayer::bearer(key()).if_not_present(), with_theirs()).await.unwrap();
    assert_sent(&sent, &theirs, &["theirs", "theirs too"]);
    assert_sent(
        &send(&ApiKeyLayer::bearer(key()).if_not_present(), get(MODELS)).await.unwrap(),
        &bearer(KEY),
        &NONE,
    );

    // Either header counts for a layer that minds both, its own for one that minds one.
    let mut request = get(MODELS);
    request.headers_mut().insert("x-api-key", "theirs".parse().unwrap());
    let sent = send(&JwtLayer::new(jwt(), key()).if_not_present(), request.clone()).await.unwrap();
    assert_sent(&sent, &[], &["theirs"]);
    let (of_jwt, of_key) =
        (JwtLayer::beside_api_key(jwt()).if_not_present(), ApiKeyLayer::beside_jwt(key()).if_not_present());
    let pair = ServiceBuilder::new().layer(of_jwt.clone()).layer(of_key.clone()).into_inner();
    assert_sent(&send(&pair, request.clone()).await.unwrap(), &bearer(JWT), &["theirs"]);
    let pair = ServiceBuilder::new().layer(of_key).layer(of_jwt).into_inner();
    assert_sent(&send(&pair, request).await.unwrap(), &bearer(JWT), &["theirs"]);

    // It loosens nothing else.
    let mut elsewhere = with_theirs();
    *elsewhere.uri_mut() = "https://evil.com/".parse().unwrap();
    let refused = send(&ApiKeyLayer::bearer(key()).if_not_present(), elsewhere.clone()).await.unwrap_err();
    assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed);
    let pass =
        ApiKeyLayer::bearer(key()).if_not_present().with_origins(Origins::selam().strip_for_other_origins());
    assert_sent(&send(&pass, elsewhere).await.unwrap(), &[], &NONE);
}

#[tokio::test]
async fn h3_the_connection_header_cannot_name_ours() {
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
        let sent = send(&JwtLayer::new(jwt(), key()), request).await.unwrap();
        assert_sent(&sent, &bearer(JWT), &[KEY]);
        assert_eq!(values(&sent, "connection"), kept, "{connection:?}");
    }
}

#[tokio::test]
async fn h4_a_request_chooses_its_credentials() {
    let both = JwtLayer::new(jwt(), key());
    let other =
        Credentials::key_and_jwt(ApiKey::new("sk-selam-other").unwrap(), Token::new("a.b.c").unwrap());
    for (choice, authorization, x_api_key) in [
        (RequestAuth::ApiKey, bearer(KEY), vec![]),
        (RequestAuth::ApiKeyAndJwt, bearer(JWT), vec![KEY]),
        (RequestAuth::Anonymous, vec![], vec![]),
        (RequestAuth::Custom(other), bearer("a.b.c"), vec!["sk-selam-other"]),
    ] {
        let mut request = with_theirs();
        request.extensions_mut().insert(choice);
        assert_sent(&send(&both, request).await.unwrap(), &authorization, &x_api_key);
        // The next request has the layer's own again.
        assert_sent(&send(&both, get(MODELS)).await.unwrap(), &bearer(JWT), &[KEY]);
    }
    // The key alone stays in the header it has.
    let sent = send(&ApiKeyLayer::x_api_key(key()), with(RequestAuth::ApiKey)).await.unwrap();
    assert_sent(&sent, &[], &[KEY]);
}

#[tokio::test]
async fn h4_what_is_not_there_is_refused_and_nothing_is_sent() {
    for (layer, choice) in [
        (ApiKeyLayer::bearer(key()), RequestAuth::ApiKeyAndJwt),
        (ApiKeyLayer::x_api_key(key()), RequestAuth::ApiKeyAndJwt),
        (ApiKeyLayer::bearer(key()), RequestAuth::VoiceAgent),
        (ApiKeyLayer::per_request(), RequestAuth::ApiKey),
        (ApiKeyLayer::per_request(), RequestAuth::ApiKeyAndJwt),
        (ApiKeyLayer::per_request(), RequestAuth::VoiceAgent),
    ] {
        let refused = send(&layer, with(choice.clone())).await.unwrap_err();
        assert_eq!(refused.kind(), AuthErrorKind::CredentialUnavailable, "{choice:?}");
        assert_eq!((refused.status(), refused.is_auth()), (None, false));
    }
    // Credentials of its own go to allowed origins only.
    let mut request = with(RequestAuth::Custom(Credentials::bearer(key())));
    *request.uri_mut() = "https://evil.com/".parse().unwrap();
    let refused = send(&ApiKeyLayer::per_request(), request).await.unwrap_err();
    assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed);
}

#[tokio::test]
async fn h4_a_redirect_that_loses_the_choice_fails_closed() {
    let own = RequestAuth::Custom(Credentials::bearer(ApiKey::new("sk-selam-tenant").unwrap()));
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
                tokio::join!(client.oneshot(with(own.clone()).map(|()| Body::default())), api);
            assert_sent(&first.map(|_| ()), &bearer("sk-selam-tenant"), &NONE);
            assert!(!second, "nothing may follow");
            let error = result.unwrap_err();
            let error = AuthError::find(&*error).unwrap();
            assert_eq!(error.kind(), AuthErrorKind::CredentialUnavailable);
        }};
    }
    fails_closed!(ApiKeyLayer::per_request());
    fails_closed!(ApiKeyLayer::bearer(key()).require_request_auth());
    fails_closed!(selam);
}

#[tokio::test]
async fn h4_a_redirect_away_and_back_does_not_turn_the_choice_into_another() {
    let own = RequestAuth::Custom(Credentials::bearer(ApiKey::new("sk-selam-tenant").unwrap()));
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
    let (result, sent) = tokio::join!(client.oneshot(with(own).map(|()| Body::default())), api);
    assert_eq!(sent, [("api.selamgpt.com".to_owned(), 1), ("evil.com".to_owned(), 0)]);
    let error = AuthError::find(&*result.unwrap_err()).unwrap().kind();
    assert_eq!(error, AuthErrorKind::CredentialUnavailable);
}

#[tokio::test]
async fn h4_an_explicit_choice_counts_more_than_what_the_request_came_with() {
    let mut request = with_theirs();
    request.extensions_mut().insert(RequestAuth::ApiKey);
    let sent = send(&ApiKeyLayer::bearer(key()).if_not_present(), request).await.unwrap();
    assert_sent(&sent, &bearer(KEY), &NONE);
}

#[tokio::test]
async fn o1_a_half_that_leaves_the_headers_to_the_other_checks_the_origin_too() {
    let mut request = with(RequestAuth::ApiKey);
    *request.uri_mut() = "http://api.selamgpt.com/".parse().unwrap();
    let refused = send(&JwtLayer::beside_api_key(jwt()), request).await.unwrap_err();
    assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed);
}

#[tokio::test]
async fn the_imperative_form_writes_the_same() {
    let other = RequestAuth::Custom(Credentials::bearer(ApiKey::new("sk-selam-other").unwrap()));
    for (credentials, layered) in [
        (Credentials::bearer(key()), send(&ApiKeyLayer::bearer(key()), with_theirs()).await),
        (Credentials::x_api_key(key()), send(&ApiKeyLayer::x_api_key(key()), with_theirs()).await),
        (Credentials::key_and_jwt(key(), jwt()), send(&JwtLayer::new(jwt(), key()), with_theirs()).await),
    ] {
        let (mut parts, ()) = with_theirs().into_parts();
        credentials.apply(&Origins::selam(), &mut parts).unwrap();
        assert_eq!(&parts.headers, layered.unwrap().headers());

        let mut headers = with_theirs().headers().clone();
        credentials.apply_to_headers(&Origins::selam(), &MODELS.parse().unwrap(), &mut headers).unwrap();
        assert_eq!(headers, parts.headers);
        // Equality of header values does not count the mark.
        assert!(headers.values().chain(parts.headers.values()).all(HeaderValue::is_sensitive));

        parts.extensions.insert(other.clone());
        credentials.apply(&Origins::selam(), &mut parts).unwrap();
        assert_eq!(parts.headers[AUTHORIZATION], "Bearer sk-selam-other");

        let before = with_theirs().headers().clone();
        parts.headers = before.clone();
        parts.uri = "http://api.selamgpt.com/".parse().unwrap();
        let refused = credentials.apply(&Origins::selam(), &mut parts).unwrap_err();
        assert_eq!(refused.kind(), AuthErrorKind::OriginNotAllowed);
        assert_eq!(parts.headers, before, "nothing is written on refusal");
    }
}

#[tokio::test]
async fn a_full_header_map_is_an_error_and_no_panic() {
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
