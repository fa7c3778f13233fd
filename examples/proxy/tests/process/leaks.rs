//! What must not reach the other side: headers that tell of the caller, and headers that would speak for the proxy.

use http::{HeaderMap, HeaderName, HeaderValue, Method, Response};
use http_body_util::BodyExt;
use tokio::io::AsyncWriteExt;

use crate::support::{
    Api, Caller, Launch, Protocol, TlsListener, channel_body, empty, random, raw, read, read_head,
    response_head, secret,
};

/// Headers of edges, load balancers, tunnels, identity-aware proxies and browsers.
const TELL_OF_THE_CALLER: &str = "
    Forwarded X-Forwarded X-Forwarded-For X-Forwarded-Host X-Forwarded-Proto X-Forwarded-Port X-Forwarded-Server
    X-Forwarded-Prefix X-Forwarded-Ssl X-Forwarded-Scheme X-Forwarded-Path X-Forwarded-User X-Forwarded-Email
    X-Forwarded-Groups X-Forwarded-Preferred-Username X-Forwarded-Access-Token X-Forwarded-Client-Cert X-Forwarded-By
    X-Forwarded-Tls-Client-Cert X-Forwarded-Tls-Client-Cert-Info X-Forwarded-Method X-Forwarded-Uri X-Forwarded-Client-Ip
    X-Forward-For Forward-For Forwarded-For Forwarded-For-Ip X-Forwarder-For Z-Forwarded-For X-Original-Forwarded-For
    X-Real-IP X-Real-Port Real-IP X-Client-IP Client-IP X-ClientIP X-Cluster-Client-IP X-Remote-IP X-Remote-Addr Remote-Addr
    X-Originating-IP X-Origin-IP X-True-IP True-Client-IP True-Client-Port X-True-Client-IP X-ProxyUser-IP WL-Proxy-Client-IP
    WL-Proxy-SSL Proxy-Client-IP Source-IP X-Source-IP X-IP X-Host X-Scheme X-Url-Scheme Front-End-Https X-Https
    CF-Connecting-IP CF-Connecting-IPv6 CF-Connecting-O2O CF-Pseudo-IPv4 CF-IPCountry CF-IPCity CF-IPContinent CF-IPLatitude
    CF-Region CF-Region-Code CF-Metro-Code CF-Postal-Code CF-Timezone CF-Ray CF-Visitor CF-Worker CF-EW-Via CF-Warp-Tag-Id
    CF-Device-Type CF-Access-Jwt-Assertion CF-Access-Authenticated-User-Email CF-Access-Client-Id CF-Access-Client-Secret
    CF-Access-Token CF-Bot-Score CF-JA3-Hash CF-Verified-Bot CF-Cert-Presented CF-Client-Cert-Der-Base64 CF-Team CF-Request-ID
    X-Amzn-Oidc-Data X-Amzn-Oidc-Identity X-Amzn-Oidc-Accesstoken X-Amzn-Mtls-Clientcert X-Amzn-Mtls-Clientcert-Leaf
    X-Amzn-Mtls-Clientcert-Subject X-Amzn-Tls-Version X-Amzn-Tls-Cipher-Suite X-Amzn-Lambda-Context X-Amzn-Vpc-Id
    X-Amz-Cf-Id X-Amz-Cf-Pop X-Amz-Security-Token CloudFront-Viewer-Address CloudFront-Viewer-Country
    CloudFront-Viewer-City CloudFront-Is-Mobile-Viewer CloudFront-Forwarded-Proto CloudFront-Viewer-JA3-Fingerprint
    Fastly-Client-IP Fastly-Client Fastly-FF Fastly-SSL Fastly-Orig-Accept-Encoding Fastly-Temp-XFF X-Fastly-Client-IP
    Akamai-Origin-Hop Akamai-Client-IP X-Akamai-Edgescape X-Akamai-Config-Log-Detail X-Akamai-Device-Characteristics
    Incap-Client-IP X-Incap-Client-IP X-Sucuri-ClientIP X-Sucuri-Country Ali-CDN-Real-IP CDN-RequestCountryCode CDN-RequestId
    X-CDN-Src-Port EO-Client-IP EO-Connecting-IP DO-Connecting-IP X-Edge-Location GeoIP-Country-Code X-GeoIP-Country X-Geo-City
    X-Client-Geo-Location X-Country-Code X-JA3-Fingerprint X-JA4 Fly-Client-IP Fly-Forwarded-Port Fly-Region
    Fly-Forwarded-Proto Fly-Forwarded-Ssl X-Vercel-Forwarded-For X-Vercel-IP-Country X-Vercel-IP-City X-Vercel-Id
    X-Vercel-Proxied-For X-Vercel-JA4-Digest X-Vercel-Oidc-Token X-NF-Client-Connection-IP X-NF-Account-Id X-NF-Geo X-NF-Request-Id
    X-Nginx-Proxy X-Accel-Internal X-Envoy-External-Address X-Envoy-Peer-Metadata X-Envoy-Peer-Metadata-Id
    X-Envoy-Internal X-Envoy-Original-Path X-Envoy-Downstream-Service-Cluster X-Istio-Attributes L5d-Client-Id L5d-Dst-Canonical
    X-Traefik-Router X-Kong-Request-Id X-HAProxy-Server-State X-Varnish X-Apisix-Request X-Heroku-Queue-Depth X-Request-Start
    Connect-Time Total-Route-Time X-Railway-Edge X-Render-Origin-Server Rndr-Id X-Zscaler-Client-IP X-Bluecoat-Via
    X-AppEngine-Country X-AppEngine-User-IP X-AppEngine-Default-Namespace X-AppEngine-User-Email X-Goog-Iap-Jwt-Assertion
    X-Goog-Authenticated-User-Email X-Goog-Authenticated-User-Id X-Goog-Api-Key X-Goog-User-Project X-Serverless-Authorization
    X-Endpoint-API-UserInfo X-Apigateway-Api-Userinfo X-MS-Client-Principal X-MS-Client-Principal-Id X-MS-Client-Principal-Name
    X-MS-Client-Principal-Idp X-MS-Token-Aad-Access-Token X-MS-Token-Aad-Id-Token X-MS-Token-Aad-Refresh-Token
    X-MS-Token-Google-Id-Token X-MS-Auth-Token X-Azure-ClientIP X-Azure-SocketIP X-Azure-Ref X-Azure-FDID X-Azure-RequestChain
    X-ARR-ClientCert X-ARR-SSL X-ARR-Log-Id X-FD-HealthProbe X-WAWS-Unencoded-URL Disguised-Host Was-Default-Hostname
    X-Site-Deployment-Id X-AppService-Proto X-Auth-Request-User X-Auth-Request-Email X-Auth-Request-Access-Token
    X-Auth-Request-Groups X-Auth-Request-Preferred-Username X-Auth-Request-Redirect X-Auth-Token X-Auth-User X-Auth-Username
    X-Pomerium-Jwt-Assertion X-Pomerium-Claim-Email X-Pomerium-Claim-Groups Tailscale-User-Login Tailscale-User-Name
    Tailscale-User-Profile-Pic Tailscale-Headers-Info X-Tailscale-Tailnet X-Webauth-User X-Webauth-Email X-Webauth-Name
    X-Authentik-Username X-Authentik-Groups X-Authentik-Email X-Authentik-Jwt X-Authentik-Uid Remote-User Remote-Groups
    Remote-Email Remote-Name X-Remote-User X-Remote-Group X-Remote-Extra-Scopes X-Vouch-User X-Vouch-Idp-AccessToken
    X-Authenticated-User X-Authenticated-Userid X-Authenticated-Scope X-Consumer-Id X-Consumer-Username X-Consumer-Custom-Id
    X-Credential-Identifier X-Anonymous-Consumer X-Userinfo X-User X-User-Id X-User-Email X-Username X-Email X-Groups
    X-Preferred-Username X-Token X-Token-Sub X-Token-User-Name X-Jwt X-Jwt-Claim-Sub X-Jwt-Payload X-Id-Token X-Access-Token
    X-Refresh-Token X-Session-Token X-Csrf-Token X-Xsrf-Token X-Okta-User X-Hasura-User-Id X-Hasura-Admin-Secret Oidc-Claim-Sub
    Oidc-Access-Token X-Oidc-Username Shib-Session-ID X-Shib-User Teleport-Jwt-Assertion X-Teleport-Login X-Ldap-User X-Sso-User
    Impersonate-User Impersonate-Group Impersonate-Extra-Scopes Client-Cert Client-Cert-Chain X-Client-Cert X-Client-Cert-Dn
    X-Client-Dn X-Client-Verify X-SSL-Client-Cert X-SSL-Client-S-Dn X-SSL-Client-Verify X-SSL-Client-Subject-Dn X-SSL-Cipher
    SSL-Client-Cert SSL-Client-Verify SSL-Client-Subject-Dn X-TLS-Client-Cert Proxy Proxy-Authorization Proxy-Anything
    Authorization X-Authorization X-API-Key API-Key ApiKey X-ApiKey My-API-Key Ocp-Apim-Subscription-Key Cookie Cookie2 DPoP
    Private-Token X-GitHub-Token X-Functions-Key Origin Referer From Baggage Sec-Fetch-Site Sec-Fetch-Mode Sec-Fetch-Dest
    Sec-Fetch-User Sec-Fetch-Storage-Access Sec-CH-UA Sec-CH-UA-Platform Sec-CH-UA-Model X-Original-URL X-Original-Host
    X-Original-Proto X-Original-Remote-Addr X-Original-URI X-Rewrite-URL X-HTTP-Method-Override X-HTTP-Method X-Method-Override
    X-HTTP-Host-Override X-MSISDN X-IMSI X-Nokia-MSISDN X-Up-Calling-Line-Id Ngrok-Auth-User-Email Ngrok-Auth-User-Id
    Ngrok-Auth-User-Name X-Ngrok-Agent-Ips X-Firebase-AppCheck X-Auth Authentication X-Bearer X-Secret-Key Api-Secret X-Admin-Secret
    X-Password X-Credentials X-CSRFToken X-Access-Key Helicone-Auth PayPal-Auth-Assertion User User-Id UserId X-Keycloak-User
    X-Grafana-User Helicone-User-Id X-Webhook-Secret
";

const STAY: &str = "
    Accept Accept-Language Content-Language User-Agent X-User-Agent X-Request-Id X-Client-Request-Id Request-Id traceparent
    tracestate X-Amzn-Trace-Id X-Cloud-Trace-Context X-B3-TraceId b3 Sentry-Trace CDN-Loop Idempotency-Key OpenAI-Organization
    OpenAI-Project OpenAI-Beta X-Stainless-Lang X-Stainless-Package-Version X-Stainless-OS X-Stainless-Arch
    X-Stainless-Runtime X-Stainless-Runtime-Version X-Stainless-Retry-Count X-Stainless-Timeout X-Stainless-Helper-Method
    X-Stainless-Async X-Title Authorization-Info X-Requested-With DNT Priority Prefer If-None-Match Range Session-Id
    Conversation-Id X-Zip Recipe Tokens X-Tokens X-Max-Tokens X-Cookie-Policy X-Sslide Formal X-Flyer X-Model
";

fn names(list: &str) -> Vec<HeaderName> {
    list.split_whitespace().map(|name| HeaderName::from_bytes(name.as_bytes()).unwrap()).collect()
}

/// Whether one of the headers is the caller's.
fn theirs(headers: &HeaderMap) -> Vec<&str> {
    headers.iter().filter(|(_, value)| *value == "theirs").map(|(name, _)| name.as_str()).collect()
}

#[tokio::test]
async fn nothing_tells_the_api_of_the_caller() {
    let mut removed = names(TELL_OF_THE_CALLER);
    assert!(removed.len() > 300);
    let underscores = |name: &HeaderName| name.as_str().replace('-', "_").parse().unwrap();
    removed.extend(removed.clone().iter().map(underscores));
    let stay = names(STAY);
    for protocol in Protocol::BOTH {
        let mut api = TlsListener::listen(protocol).await.exchanges();
        let token = secret(random());
        let proxy = Launch::with_key(&api)
            .callers(&format!("web:{token}\n"))
            .args([
                "--strip-header",
                "X-Corp-*,X-Ours",
                "--strip-header",
                "x-more",
                "--keep-header",
                "Baggage",
            ])
            .env("SELAM_PROXY_KEEP_HEADER", "Referer")
            .start()
            .await;
        let caller = Caller::new(&proxy, protocol);
        let mine = names("X-Corp-User X-CORP-ID x_corp_x X-Ours X_Ours X-More X-More");
        let removed: Vec<_> = removed.iter().filter(|name| *name != "baggage").chain(&mine).collect();
        for (batch, trailers) in removed.chunks(40).flat_map(|batch| [(batch, false), (batch, true)]) {
            let (feed, body) = channel_body();
            let mut request = caller.request(Method::POST, "/v1/files");
            request = request.header("x-api-key", &token);
            let headers = request.headers_mut().unwrap();
            if !trailers {
                for name in batch.iter().filter(|name| ***name != "x-api-key") {
                    headers.append(*name, HeaderValue::from_static("theirs"));
                }
                for name in &stay {
                    headers.append(name, HeaderValue::from_static("kept"));
                }
            }
            let sending = tokio::spawn({
                let (caller, request) = (caller.clone(), request.body(body).unwrap());
                async move { read(caller.send(request).await).await }
            });
            let exchange = api.next().await;
            let head = exchange.request.headers().clone();
            assert_eq!(theirs(&head), Vec::<&str>::new());
            if trailers && protocol == Protocol::Http2 {
                let all = batch.iter().map(|name| ((*name).clone(), HeaderValue::from_static("theirs")));
                let all = all.chain([(HeaderName::from_static("x-sum"), HeaderValue::from_static("1"))]);
                feed.trailer_map(all.collect()).await;
                let body = exchange.request.into_body().collect().await.unwrap();
                let trailers = body.trailers().cloned().unwrap_or_default();
                assert_eq!(theirs(&trailers), Vec::<&str>::new());
                assert_eq!(trailers["x-sum"], "1");
                exchange.answer.send(Response::new(empty())).unwrap();
            } else {
                drop(feed);
                if !trailers {
                    for name in &stay {
                        assert_eq!(head.get(name).map(HeaderValue::as_bytes), Some(&b"kept"[..]), "{name}");
                    }
                }
                exchange.respond(200, empty());
            }
            assert_eq!(sending.await.unwrap().status, 200);
        }
        // What the operator keeps arrives. The flag replaces the variable.
        let request = caller.request(Method::GET, "/v1/models").header("x-api-key", &token);
        let request = request.header("baggage", "a=1").header("referer", "theirs").body(empty()).unwrap();
        let sending = tokio::spawn(async move { read(caller.send(request).await).await });
        let head = api.next().await.respond(200, empty()).headers;
        assert_eq!((&head["baggage"], theirs(&head)), (&HeaderValue::from_static("a=1"), vec![]));
        assert_eq!(sending.await.unwrap().status, 200);
    }
}

/// Headers of a response that act for the origin that a browser called.
const SPEAK_FOR_THE_PROXY: &str = "
    Alt-Svc Set-Cookie Set-Cookie2 Strict-Transport-Security Clear-Site-Data NEL Report-To Reporting-Endpoints Public-Key-Pins
    Public-Key-Pins-Report-Only Expect-CT Expect-Staple Accept-CH Accept-CH-Lifetime Critical-CH Origin-Agent-Cluster
    Service-Worker-Allowed Service-Worker-Navigation-Preload Content-Security-Policy Content-Security-Policy-Report-Only
    X-Content-Security-Policy X-WebKit-CSP Access-Control-Allow-Origin Access-Control-Allow-Credentials
    Access-Control-Allow-Headers Access-Control-Allow-Methods Access-Control-Allow-Private-Network Access-Control-Expose-Headers
    Access-Control-Max-Age Timing-Allow-Origin Cross-Origin-Opener-Policy Cross-Origin-Embedder-Policy
    Cross-Origin-Resource-Policy Permissions-Policy Feature-Policy Document-Policy Referrer-Policy X-Frame-Options
    X-XSS-Protection X-Permitted-Cross-Domain-Policies Origin-Trial Speculation-Rules Supports-Loading-Mode Set-Login
    Sec-Session-Registration Server Proxy-Authenticate Proxy-Authentication-Info Proxy-Status Authentication-Info
    X-Accel-Redirect X-Sendfile X-Lighttpd-Send-File X-Reproxy-URL Attribution-Reporting-Register-Source Integrity-Policy
    Integrity-Policy-Report-Only Private-Network-Access-Name Private-Network-Access-Id Ad-Auction-Allowed Sec-Shared-Storage-Write
    Use-As-Dictionary
";

#[tokio::test]
async fn the_api_does_not_speak_for_the_proxy() {
    for (callers, apis) in [(Protocol::Http1, Protocol::Http1), (Protocol::Http2, Protocol::Http2)] {
        let mut api = TlsListener::listen(apis).await.exchanges();
        let proxy = Launch::with_key(&api).start().await;
        let caller = Caller::new(&proxy, callers);
        for status in [200, 302, 404, 500] {
            let sending = tokio::spawn({
                let request = caller.request(Method::GET, "/v1/models").header("te", "trailers");
                let (caller, request) = (caller.clone(), request.body(empty()).unwrap());
                async move { read(caller.send(request).await).await }
            });
            let (feed, body) = channel_body();
            let mut response = Response::builder().status(status).body(body).unwrap();
            let all: HeaderMap = names(SPEAK_FOR_THE_PROXY)
                .into_iter()
                .map(|name| (name, HeaderValue::from_static("theirs")))
                .chain(
                    names("X-Request-Id Cache-Control ETag Vary X-RateLimit-Limit")
                        .into_iter()
                        .map(|name| (name, HeaderValue::from_static("kept"))),
                )
                .collect();
            *response.headers_mut() = all.clone();
            response.headers_mut().insert("trailer", HeaderValue::from_static("x-request-id"));
            api.next().await.answer(response);
            feed.trailer_map(all).await;
            let answer = sending.await.unwrap();
            assert_eq!(answer.status, status);
            assert_eq!(theirs(&answer.headers), Vec::<&str>::new());
            assert!(answer.headers.contains_key("x-ratelimit-limit") && answer.headers["etag"] == "kept");
            assert!(!answer.headers.contains_key("server"));
            let trailers = answer.trailers.unwrap();
            assert_eq!(theirs(&trailers), Vec::<&str>::new());
            assert_eq!(trailers["x-request-id"], "kept");
        }
    }
}

/// The same for a 101, and for informational responses before the final one.
#[tokio::test]
async fn interim_responses_do_not_speak_for_the_proxy() {
    let api = TlsListener::listen(Protocol::Http1).await;
    let proxy = Launch::with_key(&api).start().await;
    let mut caller = raw(&proxy).await;
    caller.write_all(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut connection = api.accept().await;
    read_head(&mut connection).await;
    let answer = "HTTP/1.1 103 Early Hints\r\nSet-Cookie: theirs\r\nLink: </theirs>; rel=preload\r\n\r\n\
         HTTP/1.1 200 OK\r\nAlt-Svc: theirs\r\nContent-Length: 0\r\n\r\n";
    connection.write_all(answer.as_bytes()).await.unwrap();
    let head = response_head(&mut caller).await;
    assert!(head.starts_with("HTTP/1.1 200 ") && !head.contains("theirs"), "{head}");

    let mut caller = raw(&proxy).await;
    let handshake =
        "GET /v1/live HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
    caller.write_all(handshake.as_bytes()).await.unwrap();
    let mut connection = api.accept().await;
    read_head(&mut connection).await;
    let answer = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Set-Cookie: theirs\r\nStrict-Transport-Security: theirs\r\nServer: theirs\r\n\r\n";
    connection.write_all(answer.as_bytes()).await.unwrap();
    let head = response_head(&mut caller).await;
    assert!(head.starts_with("HTTP/1.1 101 ") && !head.contains("theirs"), "{head}");
}

#[tokio::test]
async fn locations_below_the_base_url_stay_on_the_proxy() {
    for protocol in Protocol::BOTH {
        let mut api = TlsListener::listen(protocol).await.exchanges();
        let origin = api.base_url().replace("/v1", "");
        let host = origin.replace("https://", "");
        let key = secret(format!("sk-selam-{}", random()));
        let base = format!("{origin}/gateway/v2");
        let proxy =
            Launch::for_api(&api).env("SELAM_API_KEY", &key).args(["--base-url", &base]).start().await;
        let caller = Caller::new(&proxy, protocol);
        for (name, value, expected) in [
            ("location", format!("{base}/files/8?a=1#b"), "/v1/files/8?a=1#b"),
            ("location", format!("http://{host}/gateway/v2/files/8"), "/v1/files/8"),
            ("location", format!("//{}/gateway/v2", host.to_uppercase()), "/v1"),
            ("location", "/gateway/v2/files/8".to_owned(), "/v1/files/8"),
            ("location", "8".to_owned(), "/v1/files/8"),
            ("location", format!("{base}/files/8?api_key={key}&a=1"), "/v1/files/8?a=1"),
            ("content-location", format!("{base}/files/7"), "/v1/files/7"),
            ("operation-location", format!("{base}/operations/7"), "/v1/operations/7"),
            ("refresh", format!("1; url={base}/files/8"), "1; url=/v1/files/8"),
            ("link", format!("<{base}/files?after=8>; rel=\"next\""), "</v1/files?after=8>; rel=\"next\""),
            (
                "location",
                "https://elsewhere.example/v1/files/8?token=1".to_owned(),
                "https://elsewhere.example/v1/files/8?token=1",
            ),
            ("location", format!("https://elsewhere.example/?k={key}&a=1"), "https://elsewhere.example/?a=1"),
            ("location", "/elsewhere".to_owned(), "/elsewhere"),
        ] {
            let sending = tokio::spawn({
                let request = caller.request(Method::GET, "/v1/files/7").body(empty()).unwrap();
                let caller = caller.clone();
                async move { read(caller.send(request).await).await }
            });
            let status = if name == "location" { 307 } else { 200 };
            let response = Response::builder().status(status).header(name, &value).body(empty()).unwrap();
            assert_eq!(api.next().await.answer(response).uri.path(), "/gateway/v2/files/7");
            assert_eq!(sending.await.unwrap().headers[name], expected, "{value}");
        }
    }
}
