//! K4, K8: JWTs signed locally, verified with `ring`, which shares no code with the signer.

use std::{
    collections::HashSet,
    path::Path,
    task::Poll,
    time::{Duration, UNIX_EPOCH},
};

use base64::{
    Engine as _,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use jsonwebtoken::crypto::{CryptoProvider, KeyUtils};
use proptest::prelude::*;
use ring::{
    hmac,
    signature::{self, UnparsedPublicKey, VerificationAlgorithm},
};
use secrecy::{SecretSlice, SecretString};
use serde_json::{Map, Value, json};
use tokio::{runtime::Builder, time::timeout};
use tower_selam::{
    ConfigErrorKind, RefreshPolicy, Refreshing, TestClock,
    source::{JwtSigner, Reason, SigningAlgorithm, SigningKey, Source},
};
use zeroize::Zeroizing;

use crate::{
    environment::{CASE, run, tell},
    files::{Directory, write_old},
    support::HANG,
};

const SECRET: &[u8; 64] = b"a secret of sixty-four bytes, which is what HS512 asks for .....";

const RSA: &str = include_str!("../keys/rsa.pem");
const P256: &str = include_str!("../keys/p256.pem");
const P384: &str = include_str!("../keys/p384.pem");
const ED25519: &str = include_str!("../keys/ed25519.pem");

const ALGORITHMS: [(SigningAlgorithm, &str); 12] = [
    (SigningAlgorithm::Hs256, "HS256"),
    (SigningAlgorithm::Hs384, "HS384"),
    (SigningAlgorithm::Hs512, "HS512"),
    (SigningAlgorithm::Rs256, "RS256"),
    (SigningAlgorithm::Rs384, "RS384"),
    (SigningAlgorithm::Rs512, "RS512"),
    (SigningAlgorithm::Ps256, "PS256"),
    (SigningAlgorithm::Ps384, "PS384"),
    (SigningAlgorithm::Ps512, "PS512"),
    (SigningAlgorithm::Es256, "ES256"),
    (SigningAlgorithm::Es384, "ES384"),
    (SigningAlgorithm::EdDsa, "EdDSA"),
];

/// Returns the test key for the algorithm `name`.
fn key(name: &str) -> SigningKey {
    match &name[..2] {
        "HS" => SigningKey::hmac(SECRET),
        "RS" | "PS" => SigningKey::from_pem(RSA).unwrap(),
        "ES" if name == "ES256" => SigningKey::from_pem(P256).unwrap(),
        "ES" => SigningKey::from_pem(P384).unwrap(),
        _ => SigningKey::from_pem(ED25519).unwrap(),
    }
}

/// Makes a signer whose clock shows 1,900,000,000.9 seconds since the epoch.
fn signer(algorithm: SigningAlgorithm, key: SigningKey) -> JwtSigner {
    JwtSigner::new(algorithm, key).unwrap().with_clock(clock())
}

fn hs256() -> JwtSigner {
    signer(SigningAlgorithm::Hs256, SigningKey::hmac(SECRET))
}

fn clock() -> TestClock {
    TestClock::new(UNIX_EPOCH + Duration::from_millis(1_900_000_000_900))
}

/// Returns whether `ring` accepts the signature of the JWT for the algorithm `name`.
fn verifies(name: &str, jwt: &str) -> bool {
    let (message, signature) = jwt.rsplit_once('.').unwrap();
    let (message, signature) = (message.as_bytes(), BASE64_URL_SAFE_NO_PAD.decode(signature).unwrap());
    if name.starts_with("HS") {
        let algorithm = match name {
            "HS256" => hmac::HMAC_SHA256,
            "HS384" => hmac::HMAC_SHA384,
            _ => hmac::HMAC_SHA512,
        };
        return hmac::verify(&hmac::Key::new(algorithm, SECRET), message, &signature).is_ok();
    }
    let rsa = &include_bytes!("../keys/rsa-public.der")[..];
    let (algorithm, public): (&'static dyn VerificationAlgorithm, &[u8]) = match name {
        "RS256" => (&signature::RSA_PKCS1_2048_8192_SHA256, rsa),
        "RS384" => (&signature::RSA_PKCS1_2048_8192_SHA384, rsa),
        "RS512" => (&signature::RSA_PKCS1_2048_8192_SHA512, rsa),
        "PS256" => (&signature::RSA_PSS_2048_8192_SHA256, rsa),
        "PS384" => (&signature::RSA_PSS_2048_8192_SHA384, rsa),
        "PS512" => (&signature::RSA_PSS_2048_8192_SHA512, rsa),
        "ES256" => (&signature::ECDSA_P256_SHA256_FIXED, include_bytes!("../keys/p256-public.bin")),
        "ES384" => (&signature::ECDSA_P384_SHA384_FIXED, include_bytes!("../keys/p384-public.bin")),
        "EdDSA" => (&signature::ED25519, include_bytes!("../keys/ed25519-public.bin")),
        _ => panic!("{name}"),
    };
    UnparsedPublicKey::new(algorithm, public).verify(message, &signature).is_ok()
}

/// Decodes the header and the claims of a JWT.
fn read(jwt: &str) -> (Value, Value) {
    let part = |part: &str| serde_json::from_slice(&BASE64_URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap();
    let [header, claims, _] = jwt.split('.').collect::<Vec<_>>()[..] else { panic!("{jwt}") };
    (part(header), part(claims))
}

fn sign(signer: &JwtSigner) -> String {
    signer.sign().unwrap().expose_secret().to_owned()
}

/// K4: `ring` verifies JWTs of every algorithm.
#[test]
fn every_algorithm_verifies_with_ring() {
    for (algorithm, name) in ALGORITHMS {
        let signer = signer(algorithm, key(name)).with_claims(json!({ "sub": "selam" })).unwrap();
        let jwt = sign(&signer);
        assert!(verifies(name, &jwt), "{name}");
        assert_eq!(read(&jwt).0, json!({ "alg": name, "typ": "JWT" }));

        let (_, rest) = jwt.split_once('.').unwrap();
        assert!(!verifies(name, &format!("e30.{rest}")), "{name}: a changed header");
    }
}

/// K4: PKCS#8, PKCS#1 and SEC1, in any layout of the PEM.
#[test]
fn every_key_format_is_read() {
    let crlf = P256.replace('\n', "\r\n");
    let indented = P256.replace('\n', "\n    ");
    let one_line = P384.replace('\n', " ");
    let with_text =
        format!("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\nthe key:\n{ED25519}end");
    for (algorithm, name, pem) in [
        (SigningAlgorithm::Rs256, "RS256", include_str!("../keys/rsa-pkcs1.pem")),
        (SigningAlgorithm::Es256, "ES256", include_str!("../keys/p256-sec1.pem")),
        (SigningAlgorithm::Es384, "ES384", include_str!("../keys/p384-sec1.pem")),
        (SigningAlgorithm::Es256, "ES256", &*crlf),
        (SigningAlgorithm::Es256, "ES256", &*indented),
        (SigningAlgorithm::Es384, "ES384", &*one_line),
        (SigningAlgorithm::EdDsa, "EdDSA", &*with_text),
    ] {
        let key = SigningKey::from_pem(pem).unwrap_or_else(|error| panic!("{error}: {pem}"));
        assert!(verifies(name, &sign(&signer(algorithm, key))), "{pem}");
    }
}

/// K4: text, bytes and `secrecy` types.
#[test]
fn every_type_of_secret_is_accepted() {
    let text = std::str::from_utf8(SECRET).unwrap();
    for key in [
        SigningKey::hmac(SECRET),
        SigningKey::hmac(*SECRET),
        SigningKey::hmac(&SECRET[..]),
        SigningKey::hmac(SECRET.to_vec()),
        SigningKey::hmac(SecretSlice::from(SECRET.to_vec())),
        SigningKey::hmac(text),
        SigningKey::hmac(text.to_owned()),
        SigningKey::hmac(SecretString::from(text)),
    ] {
        assert!(verifies("HS512", &sign(&signer(SigningAlgorithm::Hs512, key))));
    }
    for key in [SigningKey::from_pem(P256.to_owned()), SigningKey::from_pem(SecretString::from(P256))] {
        assert!(verifies("ES256", &sign(&signer(SigningAlgorithm::Es256, key.unwrap()))));
    }
}

/// K4: the JWT has the configured header and claims, `iat` and `exp`.
#[test]
fn header_and_claims_are_as_configured() {
    let claims = json!({ "iss": "it", "sub": "selam", "aud": ["a", "b"], "nbf": 1, "jti": "mine", "n": { "m": null } });
    let signer = hs256().with_key_id("2026-01").with_claims(&claims).unwrap();
    let (header, mut claimed) = read(&sign(&signer));
    assert_eq!(header, json!({ "alg": "HS256", "typ": "JWT", "kid": "2026-01" }));
    let claimed = claimed.as_object_mut().unwrap();
    assert_eq!(claimed.remove("iat"), Some(json!(1_899_999_995)), "whole seconds, rounded down");
    assert_eq!(claimed.remove("exp"), Some(json!(1_900_000_295)));
    assert_eq!(Value::Object(claimed.clone()), claims);

    let token = signer.with_lifetime(Duration::from_secs(60)).sign().unwrap();
    assert_eq!(token.expires_at(), Some(UNIX_EPOCH + Duration::from_secs(1_900_000_055)));
}

/// K4: claims that are not an object, or contain `iat` or `exp`.
#[test]
fn invalid_claims_are_refused_and_not_shown() {
    use ConfigErrorKind::{NotAnObject, ReservedClaim};

    for (claims, kind) in [
        (json!("secret"), NotAnObject),
        (json!(["secret"]), NotAnObject),
        (json!(null), NotAnObject),
        (json!({ "iat": 0, "sub": "secret" }), ReservedClaim),
        (json!({ "exp": null, "sub": "secret" }), ReservedClaim),
    ] {
        let error = hs256().with_claims(&claims).unwrap_err();
        assert_eq!(error.kind(), &kind, "{claims}");
        assert!(!format!("{error} {error:?}").contains("secret"));
    }
    let error = hs256().with_claims(json!({ "exp": 1 })).unwrap_err();
    assert_eq!(error.to_string(), "JWT claims set has an `iat` or `exp`, which the signer sets");
}

/// K8: JWTs signed in the same second differ by their `jti`, unless the program sets or omits it.
#[test]
fn unique_ids_distinguish_simultaneous_jwts() {
    let signer = hs256();
    let id = |signer: &JwtSigner| read(&sign(signer)).1.get("jti").cloned();
    let ids: HashSet<_> = (0..100).map(|_| id(&signer).unwrap().as_str().unwrap().to_owned()).collect();
    assert_eq!(ids.len(), 100);
    assert!(ids.iter().all(|id| id.len() == 22), "128 bits");
    assert_eq!(id(&signer.clone().without_unique_ids()), None);
    for signer in [signer.clone(), signer.without_unique_ids()] {
        assert_eq!(id(&signer.with_claims(json!({ "jti": "mine" })).unwrap()), Some(json!("mine")));
    }
}

/// K8: a verifier without any leeway, whose clock is behind or ahead.
#[tokio::test(start_paused = true)]
async fn strict_verifier_behind_accepts_a_new_jwt() {
    let accepts = |jwt: &str, at: u64| {
        let claims = read(jwt).1;
        let time = |name: &str| claims[name].as_u64().unwrap();
        verifies("HS256", jwt) && time("iat") <= at && time("nbf") <= at && at < time("exp")
    };
    let (now, second) = (1_900_000_000, Duration::from_secs(1));
    for (leeway, lifetime, behind) in [
        (None, 300, 5),
        (Some(Duration::ZERO), 300, 0),
        (Some(30 * second), 300, 30),
        (Some(second * 7 / 2), 300, 3),
        // At most half the lifetime.
        (None, 8, 4),
        (Some(Duration::MAX), 300, 150),
        (None, 1, 0),
    ] {
        let clock = clock();
        let mut signer = hs256().with_clock(clock.clone()).with_lifetime(lifetime * second);
        if let Some(leeway) = leeway {
            signer = signer.with_leeway(leeway);
        }
        let jwts = Refreshing::with_policy(signer, RefreshPolicy::new().with_clock(clock.clone()));
        let jwt = jwts.token().await.unwrap();
        let at = |at| accepts(jwt.expose_secret(), at);
        assert!(at(now) && at(now - behind) && !at(now - behind - 1), "{leeway:?}");
        let claims = read(jwt.expose_secret()).1;
        assert_eq!(claims["exp"].as_u64().unwrap() - claims["iat"].as_u64().unwrap(), u64::from(lifetime));
        // The engine's idea of the expiry is the verifier's.
        assert_eq!(jwts.expires_at(), jwt.expires_at(), "{leeway:?}");
    }
}

/// K8: each refresh brings another JWT, also within one second.
#[tokio::test(start_paused = true)]
async fn rejected_jwt_is_replaced_within_the_second() {
    let clock = clock();
    let signer = hs256().with_clock(clock.clone());
    let jwts = Refreshing::with_policy(signer, RefreshPolicy::new().with_clock(clock.clone()));
    let mut seen = HashSet::new();
    for _ in 0..5 {
        let jwt = jwts.token().await.unwrap();
        assert!(seen.insert(jwt.id()), "the rejected JWT again");
        jwts.accepted(&jwt);
        jwts.rejected(&jwt);
    }
}

/// K4: every algorithm with every kind of key.
#[test]
fn key_must_match_the_algorithm() {
    for (algorithm, name) in ALGORITHMS {
        for other in ["HS256", "RS256", "ES256", "ES384", "EdDSA"] {
            let same =
                name == other || (name[1..2] == *"S" && name[..2] != *"ES" && kind(name) == kind(other));
            assert_eq!(JwtSigner::new(algorithm, key(other)).is_ok(), same, "{name} {other}");
        }
    }
    let error = JwtSigner::new(SigningAlgorithm::Es256, key("RS256")).unwrap_err();
    assert_eq!(
        error.to_string(),
        "signing key is an RSA key, but its algorithm signs with an EC key on P-256"
    );
}

/// Maps algorithms that share keys to one name.
fn kind(name: &str) -> &str {
    if name.starts_with("PS") { "RS" } else { &name[..2] }
}

/// K4: RFC 7518 sections 3.2 and 3.3.
#[test]
fn short_keys_are_refused() {
    for (algorithm, least) in
        [(SigningAlgorithm::Hs256, 256), (SigningAlgorithm::Hs384, 384), (SigningAlgorithm::Hs512, 512)]
    {
        let secret = &SECRET[..least / 8];
        assert!(JwtSigner::new(algorithm, SigningKey::hmac(secret)).is_ok());
        for short in [&secret[1..], &[]] {
            let error = JwtSigner::new(algorithm, SigningKey::hmac(short)).unwrap_err();
            assert!(matches!(error.kind(), ConfigErrorKind::TooShort { min_bits, .. } if *min_bits == least));
        }
    }
    let short = SigningKey::from_pem(include_str!("../keys/rsa-1024.pem")).unwrap();
    for algorithm in [SigningAlgorithm::Rs512, SigningAlgorithm::Ps512] {
        let error = JwtSigner::new(algorithm, short.clone()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "signing key is shorter than the 2048 bits that its algorithm requires"
        );
    }
}

/// K4: the error names the file and does not show its content.
#[test]
fn invalid_key_file_is_named() {
    let directory = Directory::new();
    let file = directory.file();
    let named = format!("signing key from the file {}", file.display());
    let refusal = |file: &Path| {
        let error = SigningKey::from_pem_file(file).unwrap_err();
        assert_eq!(error.file(), Some(file));
        let message = error.to_string();
        assert!(!format!("{message} {error:?}").contains("MC4CAQ"));
        message
    };
    assert_eq!(refusal(&file), format!("{named} cannot be read: entity not found"));

    const INVALID: &str =
        "is not a private key in PEM: RSA of up to 4096 bits, EC on P-256 or P-384, or Ed25519";
    const ENCRYPTED: &str = "is encrypted: decrypt it first";
    let truncated = &ED25519[..60];
    let damaged = ED25519.replace("MC4CAQ", "MC4CAA");
    let mistyped = ED25519.replace("MC4CAQ", "MC4C?Q");
    let mislabelled = ED25519.replace("PRIVATE", "RSA PRIVATE");
    let point_off_curve = P256.replace("QgAEHzS", "QgAEHzT").replace("hRANCAA", "hRANCAB");
    let openssl_legacy =
        "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nMC4CAQ==\n-----END RSA PRIVATE KEY-----";
    for (content, message) in [
        ("", "is empty"),
        (" \n", "is empty"),
        ("MC4CAQ", INVALID),
        (truncated, INVALID),
        (&*damaged, INVALID),
        (&*mistyped, INVALID),
        (&*mislabelled, INVALID),
        (&*point_off_curve, INVALID),
        (include_str!("../keys/public.pem"), INVALID),
        (include_str!("../keys/p521.pem"), INVALID),
        (include_str!("../keys/rsa-composite.pem"), INVALID),
        (include_str!("../keys/encrypted.pem"), ENCRYPTED),
        (openssl_legacy, ENCRYPTED),
    ] {
        write_old(&file, content);
        assert_eq!(refusal(&file), format!("{named} {message}"), "{content}");
    }

    write_old(&file, format!("\u{feff}{ED25519}"));
    let key = SigningKey::from_pem_file(&file).unwrap();
    let error = JwtSigner::new(SigningAlgorithm::Hs256, key).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{named} is an Ed25519 key, but its algorithm signs with an HMAC secret")
    );
}

/// S2: `Debug` of the signer, its key and the fetched token.
#[tokio::test]
async fn debug_shows_neither_key_nor_claims() {
    for (algorithm, name) in [(SigningAlgorithm::Hs256, "HS256"), (SigningAlgorithm::EdDsa, "EdDSA")] {
        let signer = signer(algorithm, key(name)).with_claims(json!({ "sub": "somebody" })).unwrap();
        let signer = signer.with_subject("user-1");
        let fetched = Source::fetch(&signer, Reason::First).await.unwrap();
        let shown = format!("{signer:?} {signer:#?} {:?} {fetched:?}", key(name));
        assert!(shown.contains("[redacted]"));
        for secret in ["a secret of", "97, 32, 115", "MC4CAQ", "48, 46, 2", "somebody", "user-1"] {
            assert!(!shown.contains(secret), "{shown}");
        }
    }
}

/// K4: for every reason.
#[tokio::test]
async fn each_fetch_signs_a_new_jwt() {
    let signer = hs256();
    let token = signer.sign().unwrap();
    let mut fetched = HashSet::new();
    for reason in [Reason::First, Reason::Expiring(token.clone()), Reason::Rejected(token)] {
        fetched.insert(format!("{:?}", Source::fetch(&signer, reason).await.unwrap()));
    }
    assert_eq!(fetched.len(), 3, "{fetched:?}");
}

/// K4: under an engine, one signature per lifetime and one after a rejection.
#[tokio::test(start_paused = true)]
async fn engine_signs_once_per_lifetime() {
    let clock = clock();
    let signer = hs256().with_clock(clock.clone());
    let jwts = Refreshing::with_policy(signer, RefreshPolicy::new().with_clock(clock.clone()));

    let first = jwts.token().await.unwrap();
    assert!(verifies("HS256", first.expose_secret()));
    assert_eq!(jwts.token().await.unwrap().id(), first.id(), "the token is reused");

    clock.jump(Duration::from_secs(301));
    let second = jwts.token().await.unwrap();
    assert_eq!(read(second.expose_secret()).1["iat"], json!(1_900_000_296));

    jwts.rejected(&second);
    let third = jwts.token().await.unwrap();
    assert_ne!(third.id(), second.id());
    assert!(verifies("HS256", third.expose_secret()));
}

/// K4: requests on the same thread would wait for an RSA or ECDSA signature.
#[test]
fn slow_signatures_run_on_another_thread() {
    let runtime = Builder::new_current_thread().enable_time().max_blocking_threads(1).build().unwrap();
    let (occupied, release) = std::sync::mpsc::channel::<()>();
    runtime.spawn_blocking(move || release.recv());
    runtime.block_on(async {
        let signers = ALGORITHMS.map(|(algorithm, name)| (name, signer(algorithm, key(name))));
        let mut fetches = Vec::new();
        for (name, signer) in &signers {
            let mut fetch = tokio_test::task::spawn(Source::fetch(signer, Reason::First));
            match fetch.poll() {
                Poll::Ready(fetched) => {
                    assert!(name.starts_with("HS") || *name == "EdDSA", "{name}");
                    fetched.unwrap();
                }
                Poll::Pending => fetches.push((name, fetch)),
            }
        }
        assert_eq!(fetches.len(), 8, "the others wait for the only blocking thread");
        drop(occupied);
        for (name, fetch) in fetches {
            timeout(HANG, fetch).await.unwrap_or_else(|_| panic!("{name} is never signed")).unwrap();
        }
    });
}

/// K4: tokio does not advance paused time while the blocking pool is busy.
#[tokio::test(start_paused = true)]
async fn paused_time_stops_while_signing() {
    let (clock, before) = (clock(), tokio::time::Instant::now());
    let signer = signer(SigningAlgorithm::Ps256, key("PS256")).with_clock(clock.clone());
    let jwts = Refreshing::with_policy(signer, RefreshPolicy::new().with_clock(clock));
    assert!(verifies("PS256", jwts.token().await.unwrap().expose_secret()));
    assert_eq!(before.elapsed(), Duration::ZERO);
}

/// K4: the runtime shuts down before the signature is made.
#[test]
fn runtime_shutdown_is_an_error() {
    let runtime = Builder::new_current_thread().build().unwrap();
    let handle = runtime.handle().clone();
    drop(runtime);
    let _entered = handle.enter();
    let signer = signer(SigningAlgorithm::Es256, key("ES256"));
    let mut fetch = tokio_test::task::spawn(Source::fetch(&signer, Reason::First));
    let Poll::Ready(result) = fetch.poll() else { panic!("the fetch never completes") };
    let error = result.unwrap_err();
    assert!(!error.is_permanent());
    assert_eq!(error.to_string(), "the source panicked, or its runtime was shut down");
}

/// K4: a subject is the `sub` of one clone and leaves the others unchanged.
#[test]
fn subject_belongs_to_one_clone() {
    let claims = json!({ "sub": "somebody", "iss": "it" });
    let somebody = hs256().with_subject("first").with_claims(claims).unwrap();
    let subject = |signer: &JwtSigner| read(&sign(signer)).1["sub"].clone();
    assert_eq!(subject(&somebody), "first", "replaces the claim, in either order");
    let other = somebody.clone().with_subject("an \"other\"\n\u{1f600}");
    assert_eq!(subject(&other), "an \"other\"\n\u{1f600}");
    assert_eq!(subject(&somebody), "first");
    assert_eq!(read(&sign(&other)).1["iss"], "it");

    let changed = other.clone().with_key_id("new").with_lifetime(Duration::from_secs(9));
    assert_eq!(read(&sign(&changed)).0["kid"], "new");
    assert_eq!(read(&sign(&other)).0.get("kid"), None, "other clones are unchanged");
    assert_eq!(read(&sign(&other)).1["exp"], json!(1_900_000_295));
}

/// K4: 1,000 signers share key and claims.
#[test]
fn per_subject_signers_are_small() {
    let claims: Map<String, Value> = (0..100).map(|n| (n.to_string(), json!("a claim"))).collect();
    let signer =
        signer(SigningAlgorithm::Rs256, key("RS256")).with_key_id("a key").with_claims(claims).unwrap();
    let mut signers = Vec::with_capacity(1_000);
    let counted = allocation_counter::measure(|| {
        signers.extend((0..1_000).map(|n| signer.clone().with_subject(format!("user-{n:011}"))));
    });
    assert_eq!(signers.len(), 1_000);
    assert!(counted.bytes_current <= 32 * 1_000, "{counted:?}");
    assert!(size_of::<JwtSigner>() <= 24);
}

/// K4: any text is a valid `kid` and cannot escape the JSON header.
#[test]
fn any_key_id_is_preserved() {
    for id in [
        "",
        "a \"quoted\" id",
        "\0\u{1}\r\nX-Header: injected",
        "\u{1f600}\u{202e}",
        "../../../etc/passwd",
        "}.{",
    ] {
        let jwt = sign(&hs256().with_key_id(id));
        assert!(jwt.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)), "{jwt}");
        assert!(verifies("HS256", &jwt));
        assert_eq!(read(&jwt).0, json!({ "alg": "HS256", "typ": "JWT", "kid": id }));
    }
}

/// K4: JSON nested beyond the recursion limit of parsers.
#[test]
fn deeply_nested_claims_are_refused() {
    let nested = |levels: usize| (1..levels).fold(json!({}), |inner, _| json!({ "n": inner }));
    for (levels, accepted) in [(1, true), (127, true), (128, false), (500, false)] {
        let signer = hs256().with_claims(nested(levels));
        assert_eq!(signer.is_ok(), accepted, "{levels}");
        if let Ok(signer) = signer {
            assert!(verifies("HS256", &sign(&signer)));
            assert!(read(&sign(&signer)).1["exp"].is_u64());
        }
    }
    let error = hs256().with_claims(nested(128)).unwrap_err();
    assert_eq!(error.to_string(), "JWT claims set is not a JSON object, or is nested too deeply");
}

/// K4: extreme clocks and lifetimes.
#[tokio::test]
async fn extreme_clocks_and_lifetimes_never_panic() {
    let day = Duration::from_secs(24 * 60 * 60);
    let end = (0..63)
        .rev()
        .map(|bit| 1 << bit)
        .fold(UNIX_EPOCH, |end, seconds| end.checked_add(Duration::from_secs(seconds)).unwrap_or(end));
    let year_10_000 = UNIX_EPOCH + Duration::from_secs(253_402_300_800);
    for start in [UNIX_EPOCH - 36_500 * day, UNIX_EPOCH - day, UNIX_EPOCH, year_10_000, end - day] {
        for (lifetime, seconds) in [
            (Duration::ZERO, 1),
            (Duration::from_nanos(1_999_999_999), 1),
            (60 * day, 60 * day.as_secs()),
            (Duration::MAX, 365 * day.as_secs()),
        ] {
            let signer = hs256().with_clock(TestClock::new(start)).with_lifetime(lifetime);
            let token = signer.sign().unwrap();
            let claims = read(token.expose_secret()).1;
            let now = start.duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
            let issued = now.saturating_sub((seconds / 2).min(5));
            assert_eq!(claims["iat"], issued, "{start:?}: never before 1970");
            assert_eq!(claims["exp"], issued + seconds, "{start:?}");
            Source::fetch(&signer, Reason::Expiring(token)).await.unwrap();
        }
    }
}

/// K4: a program that enables two `jsonwebtoken` backends and selects neither gets a default that panics.
#[test]
fn default_jsonwebtoken_backend_is_not_used() {
    static PANICS: CryptoProvider = CryptoProvider {
        signer_factory: |_, _| panic!("the default was asked to sign"),
        verifier_factory: |_, _| panic!("the default was asked to verify"),
        key_utils: KeyUtils::new_unimplemented(),
    };
    // The default is process-wide.
    if std::env::var_os(CASE).is_none() {
        assert_eq!(run("sign::default_jsonwebtoken_backend_is_not_used", "own process", &[]), "signed");
        return;
    }
    PANICS.install_default().unwrap();
    for (algorithm, name) in ALGORITHMS {
        assert!(verifies(name, &sign(&signer(algorithm, key(name)))));
    }
    tell("signed");
}

/// Decodes the last block of `pem`.
fn der(pem: &str) -> Vec<u8> {
    let (_, block) = pem.rsplit_once("-----BEGIN").unwrap();
    let mut body = Zeroizing::new(String::with_capacity(block.len()));
    body.extend(block.lines().skip(1).take_while(|line| !line.starts_with('-')));
    BASE64_STANDARD.decode(body.as_bytes()).unwrap()
}

fn pem(label: &str, der: &[u8]) -> String {
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", BASE64_STANDARD.encode(der))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// K4: text that is almost PEM.
    #[test]
    fn arbitrary_text_never_panics(text in "\\PC*", dashed in "(-----|BEGIN |END |(RSA |EC |ENCRYPTED )?PRIVATE KEY|[A-Za-z0-9+/=]{1,8}|[ \\r\\n\t:,]){0,16}", bytes in any::<Vec<u8>>()) {
        let _ = SigningKey::from_pem(&*text);
        let _ = SigningKey::from_pem(&*dashed);
        for label in ["PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY", "PRIVATE KEY-----\n-----BEGIN "] {
            let _ = SigningKey::from_pem(pem(label, &bytes));
        }
    }

    /// K4: one changed byte or a truncated key. A key that is accepted all the same can sign.
    #[test]
    fn damaged_keys_never_panic(at in any::<prop::sample::Index>(), to in any::<u8>(), cut in any::<bool>()) {
        for (algorithm, label, key) in [
            (SigningAlgorithm::Rs256, "PRIVATE KEY", RSA),
            (SigningAlgorithm::Ps512, "RSA PRIVATE KEY", include_str!("../keys/rsa-pkcs1.pem")),
            (SigningAlgorithm::Es256, "PRIVATE KEY", P256),
            (SigningAlgorithm::Es256, "EC PRIVATE KEY", include_str!("../keys/p256-sec1.pem")),
            (SigningAlgorithm::Es384, "PRIVATE KEY", P384),
            (SigningAlgorithm::Es384, "EC PRIVATE KEY", include_str!("../keys/p384-sec1.pem")),
            (SigningAlgorithm::EdDsa, "PRIVATE KEY", ED25519),
        ] {
            let mut der = der(key);
            let at = at.index(der.len());
            der[at] = to;
            if cut {
                der.truncate(at);
            }
            let key = SigningKey::from_pem(pem(label, &der));
            if let Ok(signer) = key.and_then(|key| JwtSigner::new(algorithm, key)) {
                signer.sign().unwrap();
            }
        }
    }
}

/// S3: a scan of the process's memory finds the key while it is in use, and not after.
#[cfg(target_os = "linux")]
#[test]
fn key_is_wiped_with_its_last_clone() {
    use crate::secrets::resident;

    // A separate process has less memory to scan, and none of other tests.
    if std::env::var_os(CASE).is_none() {
        run("sign::key_is_wiped_with_its_last_clone", "own process", &[]);
        return;
    }
    let mask = |bytes: &[u8]| bytes.iter().map(|byte| !byte).collect::<Vec<u8>>();
    for (algorithm, pem, file) in
        [(SigningAlgorithm::Rs256, RSA, "rsa.pem"), (SigningAlgorithm::Es384, P384, "p384.pem")]
    {
        // `pem` itself is in read-only memory, which `resident` does not scan.
        let in_lines = mask(pem.as_bytes());
        let in_base64: Vec<u8> = in_lines.iter().copied().filter(|byte| *byte != !b'\n').collect();
        let mut in_binary = der(pem);
        in_binary.iter_mut().for_each(|byte| *byte = !*byte);
        // The allocator overwrites both ends of a freed block.
        let middle = |masked: &[u8]| masked[masked.len() / 2..][..80].to_vec();
        let forms = [middle(&in_lines), middle(&in_base64), middle(&in_binary)];
        let found = || forms.each_ref().map(|form| resident(form));
        assert_eq!(found(), [0, 0, 0], "{file}");

        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/keys").join(file);
        let key = SigningKey::from_pem_file(path).unwrap();
        assert_eq!(found(), [0, 0, 1], "{file}: the PEM and its decoded copies are wiped");
        let signer = JwtSigner::new(algorithm, key.clone()).unwrap();
        let signers = [signer.clone().with_subject("a"), signer.with_key_id("b")];
        assert_eq!(found(), [0, 0, 1], "{file}: clones share one key");

        let token = signers[0].sign().unwrap();
        let masked = mask(token.expose_secret().as_bytes());
        let signature = &masked[masked.len() - 100..][..80];
        assert_eq!(resident(signature), 1, "{file}: only the token holds the signature");
        drop((signers, token));
        assert_eq!((resident(signature), found()), (0, [0, 0, 1]), "{file}");
        drop(key);
        assert_eq!(found(), [0, 0, 0], "{file}");
    }
    tell("wiped");
}
