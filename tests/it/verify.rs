//! V1 to V3: JWTs of callers, signed with `ring` as an issuer would, and with every known trick.

use std::{
    convert::Infallible,
    fmt::Write as _,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, UNIX_EPOCH},
};

use base64::{
    Engine as _,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use ring::{
    hmac,
    rand::SystemRandom,
    signature::{self, EcdsaKeyPair, Ed25519KeyPair, RsaKeyPair, RsaPublicKeyComponents},
};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tower_selam::{
    ConfigErrorKind, TestClock,
    verify::{Claims, IssuerKeys, JwtVerifier, VerifyError},
};

use crate::files::{Directory, write_old};

const ISSUER: &str = "https://login.example";
const AUDIENCE: &str = "my-app";
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(60 * 60);

/// When the tests take place, in seconds since the epoch.
const NOW: u64 = 1_900_000_000;

/// Which of the test keys signs, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Signer {
    Rs256,
    Ps512,
    Es256,
    Es384,
    EdDsa,
    /// With the RSA public key in PEM as its secret.
    Hs256OfPem,
    /// With the modulus as its secret.
    Hs256OfModulus,
    None,
}

fn base64url(bytes: impl AsRef<[u8]>) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

fn der(pem: &str) -> Vec<u8> {
    let lines = pem.lines().filter(|line| !line.starts_with('-'));
    BASE64_STANDARD.decode(lines.collect::<String>()).unwrap()
}

fn pem(label: &str, der: &[u8]) -> String {
    let mut pem = format!("-----BEGIN {label}-----\n");
    for line in BASE64_STANDARD.encode(der).as_bytes().chunks(64) {
        writeln!(pem, "{}", std::str::from_utf8(line).unwrap()).unwrap();
    }
    format!("{pem}-----END {label}-----\n")
}

fn rsa() -> RsaKeyPair {
    RsaKeyPair::from_pkcs8(&der(include_str!("../keys/rsa.pem"))).unwrap()
}

fn rsa_numbers() -> RsaPublicKeyComponents<Vec<u8>> {
    rsa().public().into()
}

/// Wraps a key in `SubjectPublicKeyInfo`, with its algorithm in DER.
fn spki(algorithm: &[u8], key: &[u8]) -> String {
    let wrap = |tag: u8, content: &[u8]| {
        let length = match content.len() {
            short @ ..128 => vec![u8::try_from(short).unwrap()],
            long => [&[0x82][..], &u16::try_from(long).unwrap().to_be_bytes()].concat(),
        };
        [&[tag][..], &length, content].concat()
    };
    let bits = wrap(3, &[&[0], key].concat());
    pem("PUBLIC KEY", &wrap(0x30, &[algorithm, &bits].concat()))
}

/// The algorithm identifiers of RFC 3279 section 2.3.1, RFC 5480 and RFC 8410, in DER.
const RSA_ENCRYPTION: &[u8] = b"\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00";
const EC_P256: &[u8] =
    b"\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07";
const EC_P384: &[u8] = b"\x30\x10\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x22";
const ED25519: &[u8] = b"\x30\x05\x06\x03\x2b\x65\x70";

const P256_POINT: &[u8] = include_bytes!("../keys/p256-public.bin");
const P384_POINT: &[u8] = include_bytes!("../keys/p384-public.bin");
const ED25519_KEY: &[u8] = include_bytes!("../keys/ed25519-public.bin");

fn rsa_pem() -> String {
    spki(RSA_ENCRYPTION, include_bytes!("../keys/rsa-public.der"))
}

impl Signer {
    const GOOD: [Self; 5] = [Self::Rs256, Self::Ps512, Self::Es256, Self::Es384, Self::EdDsa];

    fn alg(self) -> &'static str {
        match self {
            Self::Rs256 => "RS256",
            Self::Ps512 => "PS512",
            Self::Es256 => "ES256",
            Self::Es384 => "ES384",
            Self::EdDsa => "EdDSA",
            Self::Hs256OfPem | Self::Hs256OfModulus => "HS256",
            Self::None => "none",
        }
    }

    fn sign(self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        let ecdsa = |algorithm, pem: &str| {
            let key = EcdsaKeyPair::from_pkcs8(algorithm, &der(pem), &random).unwrap();
            key.sign(&random, message).unwrap().as_ref().to_vec()
        };
        let rsa_signature = |padding| {
            let key = rsa();
            let mut signature = vec![0; key.public().modulus_len()];
            key.sign(padding, &random, message, &mut signature).unwrap();
            signature
        };
        let mac =
            |secret: &[u8]| hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), message).as_ref().to_vec();
        match self {
            Self::Rs256 => rsa_signature(&signature::RSA_PKCS1_SHA256),
            Self::Ps512 => rsa_signature(&signature::RSA_PSS_SHA512),
            Self::Es256 => {
                static KEY: LazyLock<EcdsaKeyPair> = LazyLock::new(|| {
                    let (algorithm, pem) =
                        (&signature::ECDSA_P256_SHA256_FIXED_SIGNING, include_str!("../keys/p256.pem"));
                    EcdsaKeyPair::from_pkcs8(algorithm, &der(pem), &SystemRandom::new()).unwrap()
                });
                KEY.sign(&random, message).unwrap().as_ref().to_vec()
            }
            Self::Es384 => {
                ecdsa(&signature::ECDSA_P384_SHA384_FIXED_SIGNING, include_str!("../keys/p384.pem"))
            }
            Self::EdDsa => {
                static KEY: LazyLock<Ed25519KeyPair> = LazyLock::new(|| {
                    let key = der(include_str!("../keys/ed25519.pem"));
                    Ed25519KeyPair::from_pkcs8_maybe_unchecked(&key).unwrap()
                });
                KEY.sign(message).as_ref().to_vec()
            }
            Self::Hs256OfPem => mac(rsa_pem().as_bytes()),
            Self::Hs256OfModulus => mac(&rsa_numbers().n),
            Self::None => Vec::new(),
        }
    }

    fn jwt(self, header: &Value, claims: &Value) -> String {
        let message = format!("{}.{}", base64url(header.to_string()), base64url(claims.to_string()));
        let signature = self.sign(message.as_bytes());
        format!("{message}.{}", base64url(signature))
    }

    /// The public key, under its own algorithm's name as `kid`.
    fn jwk(self) -> Value {
        let point = |point: &[u8], curve: &str, kid: &str| {
            let (x, y) = point[1..].split_at((point.len() - 1) / 2);
            json!({"kty": "EC", "crv": curve, "kid": kid, "x": base64url(x), "y": base64url(y)})
        };
        match self {
            Self::Es256 => point(P256_POINT, "P-256", "ES256"),
            Self::Es384 => point(P384_POINT, "P-384", "ES384"),
            Self::EdDsa => {
                json!({"kty": "OKP", "crv": "Ed25519", "kid": "EdDSA", "x": base64url(ED25519_KEY)})
            }
            _ => {
                let RsaPublicKeyComponents { n, e } = rsa_numbers();
                json!({"kty": "RSA", "kid": self.alg(), "n": base64url(n), "e": base64url(e), "use": "sig"})
            }
        }
    }

    fn pem(self) -> String {
        match self {
            Self::Es256 => spki(EC_P256, P256_POINT),
            Self::Es384 => spki(EC_P384, P384_POINT),
            Self::EdDsa => spki(ED25519, ED25519_KEY),
            _ => rsa_pem(),
        }
    }
}

fn header(signer: Signer) -> Value {
    json!({"alg": signer.alg(), "kid": signer.alg(), "typ": "JWT"})
}

fn claims() -> Value {
    json!({"iss": ISSUER, "aud": AUDIENCE, "sub": "user-7", "iat": NOW - 10, "exp": NOW + 600})
}

/// `value` with these fields set; `null` removes one.
fn with(mut value: Value, changes: &Value) -> Value {
    let fields = value.as_object_mut().unwrap();
    for (name, change) in changes.as_object().unwrap() {
        match change {
            Value::Null => drop(fields.remove(name)),
            change => drop(fields.insert(name.clone(), change.clone())),
        }
    }
    value
}

fn jwks(keys: &[Value]) -> String {
    json!({ "keys": keys }).to_string()
}

fn clock() -> TestClock {
    TestClock::new(UNIX_EPOCH + NOW as u32 * SECOND)
}

fn verifier(keys: &str) -> JwtVerifier {
    let keys = IssuerKeys::fixed(keys).unwrap().with_clock(clock());
    JwtVerifier::new(keys, [AUDIENCE, "another-app"]).with_issuer(ISSUER)
}

async fn verify(keys: &str, jwt: &str) -> Result<Claims, VerifyError> {
    verifier(keys).verify(jwt).await
}

fn all_keys() -> String {
    jwks(&Signer::GOOD.map(Signer::jwk))
}

/// V1
#[tokio::test]
async fn each_algorithm_is_verified() {
    for signer in Signer::GOOD {
        let jwt = signer.jwt(&header(signer), &claims());
        for keys in [jwks(&[signer.jwk()]), all_keys(), signer.pem()] {
            let claims = verify(&keys, &jwt).await.unwrap_or_else(|error| panic!("{signer:?}: {error}"));
            assert_eq!((claims.issuer(), claims.text("sub").as_deref()), (Some(ISSUER), Some("user-7")));
            assert_eq!(claims.expires_at(), UNIX_EPOCH + Duration::from_secs(NOW + 600));
        }
    }
    let several = Signer::GOOD.map(Signer::pem).concat();
    let pkcs1 = pem("RSA PUBLIC KEY", include_bytes!("../keys/rsa-public.der"));
    let jwt = Signer::Rs256.jwt(&header(Signer::Rs256), &claims());
    for keys in [format!("# our keys\n{several}"), pkcs1] {
        assert!(verify(&keys, &jwt).await.is_ok());
    }
    // The newer name of EdDSA with this curve.
    let (renamed, alg) = (json!({"alg": "Ed25519"}), with(Signer::EdDsa.jwk(), &json!({"alg": "Ed25519"})));
    let jwt = Signer::EdDsa.jwt(&with(header(Signer::EdDsa), &renamed), &claims());
    assert!(verify(&jwks(&[alg]), &jwt).await.is_ok());
}

/// V1: no header makes a JWT valid that the issuer did not sign.
#[tokio::test]
async fn confused_headers_are_refused() {
    use VerifyError as Error;
    let rsa = Signer::Rs256;
    let attacker = json!({"kty": "OKP", "crv": "Ed25519", "x": base64url(ED25519_KEY)});
    let only_rsa = jwks(&[rsa.jwk()]);
    for (signer, changes, expected) in [
        (Signer::None, json!({}), Error::Algorithm),
        (Signer::None, json!({"alg": "None"}), Error::Algorithm),
        (Signer::None, json!({"alg": "nOnE", "kid": "RS256"}), Error::Algorithm),
        (Signer::None, json!({"alg": "RS256", "kid": "RS256"}), Error::Signature),
        (Signer::None, json!({"alg": ""}), Error::Algorithm),
        (Signer::None, json!({"alg": 256}), Error::Malformed),
        (Signer::None, json!({"alg": null}), Error::Malformed),
        (Signer::Hs256OfPem, json!({"kid": "RS256"}), Error::Algorithm),
        (Signer::Hs256OfPem, json!({"kid": null}), Error::Algorithm),
        (Signer::Hs256OfPem, json!({"alg": "RS256", "kid": "RS256"}), Error::Signature),
        (Signer::Hs256OfModulus, json!({"kid": "RS256"}), Error::Algorithm),
        // The key says which algorithms it verifies.
        (rsa, json!({"alg": "ES256"}), Error::UnknownKey),
        (rsa, json!({"alg": "ES256", "kid": "RS256"}), Error::Algorithm),
        (rsa, json!({"alg": "RS384"}), Error::UnknownKey),
        (rsa, json!({"alg": "RS384", "kid": "RS256"}), Error::Signature),
        (rsa, json!({"alg": "PS256", "kid": "RS256"}), Error::Signature),
        (Signer::EdDsa, json!({"kid": "RS256"}), Error::Algorithm),
        // `kid` chooses a key, and nothing else.
        (rsa, json!({"kid": "../../../../dev/null"}), Error::UnknownKey),
        (rsa, json!({"kid": "RS256' UNION SELECT 'secret"}), Error::UnknownKey),
        (rsa, json!({"kid": "RS256\u{0}"}), Error::UnknownKey),
        (rsa, json!({"kid": ""}), Error::UnknownKey),
        (rsa, json!({"kid": ["RS256"]}), Error::Malformed),
        (rsa, json!({"kid": {"$ne": 1}}), Error::Malformed),
        // Keys that the JWT brings along are not used.
        (Signer::EdDsa, json!({"kid": null, "jwk": attacker}), Error::UnknownKey),
        (Signer::EdDsa, json!({"kid": "EdDSA", "jku": "https://evil.example/jwks"}), Error::UnknownKey),
        (Signer::EdDsa, json!({"kid": "EdDSA", "x5u": "https://evil.example/x5u"}), Error::UnknownKey),
        // Extensions.
        (rsa, json!({"crit": ["exp"]}), Error::Critical),
        (rsa, json!({"crit": ["b64"], "b64": false}), Error::Critical),
        (rsa, json!({"crit": []}), Error::Critical),
        (rsa, json!({"crit": "x"}), Error::Critical),
        // Other kinds of tokens.
        (rsa, json!({"typ": "logout+jwt"}), Error::Type),
        (rsa, json!({"typ": "dpop+jwt"}), Error::Type),
        (rsa, json!({"typ": "application/secevent+jwt"}), Error::Type),
    ] {
        // Where `kid` is not the point, it is that of no key in the set.
        let header = with(header(signer), &json!({"kid": "none such"}));
        let jwt = signer.jwt(&with(header, &changes), &claims());
        assert_eq!(verify(&only_rsa, &jwt).await.unwrap_err(), expected, "{signer:?} {changes}");
        assert!(verify(&rsa_pem(), &jwt).await.is_err() || signer == rsa, "{signer:?} {changes}");
    }
    for typ in [json!(null), json!("jwt"), json!("at+jwt"), json!("application/at+JWT")] {
        let jwt = rsa.jwt(&with(header(rsa), &json!({ "typ": typ })), &claims());
        assert!(verify(&only_rsa, &jwt).await.is_ok(), "{typ}");
    }
}

/// V1
#[tokio::test]
async fn claims_are_checked() {
    use VerifyError as Error;
    let exp = Error::Claim { name: "exp" };
    for (changes, expected) in [
        (json!({}), None),
        (json!({"exp": NOW - 59}), None),
        (json!({"exp": (NOW as f64) + 0.5}), None),
        (json!({"exp": NOW - 60}), Some(Error::Expired)),
        (json!({"exp": 0}), Some(Error::Expired)),
        (json!({"exp": null}), Some(exp)),
        (json!({"exp": (NOW + 600).to_string()}), Some(exp)),
        (json!({"exp": [NOW + 600]}), Some(exp)),
        (json!({"exp": true}), Some(exp)),
        (json!({"exp": -1}), Some(exp)),
        (json!({"exp": 1e300}), Some(exp)),
        (json!({"nbf": NOW + 60}), None),
        (json!({"nbf": NOW + 61}), Some(Error::NotYetValid)),
        (json!({"nbf": (NOW - 1).to_string()}), Some(Error::Claim { name: "nbf" })),
        (json!({"iss": "https://login.example/"}), Some(Error::Issuer)),
        (json!({"iss": "https://LOGIN.example"}), Some(Error::Issuer)),
        (json!({"iss": null}), Some(Error::Claim { name: "iss" })),
        (json!({"iss": [ISSUER]}), Some(Error::Claim { name: "iss" })),
        (json!({"aud": "another-app"}), None),
        (json!({"aud": ["x", AUDIENCE]}), None),
        (json!({"aud": [{"a": 1}, AUDIENCE]}), None),
        (json!({"aud": "my-app2"}), Some(Error::Audience)),
        (json!({"aud": "my-app another-app"}), Some(Error::Audience)),
        (json!({"aud": ["x", "y"]}), Some(Error::Audience)),
        (json!({"aud": []}), Some(Error::Audience)),
        (json!({"aud": null}), Some(Error::Claim { name: "aud" })),
        (json!({"aud": 7}), Some(Error::Claim { name: "aud" })),
        (json!({"aud": {AUDIENCE: 1}}), Some(Error::Claim { name: "aud" })),
    ] {
        let jwt = Signer::EdDsa.jwt(&header(Signer::EdDsa), &with(claims(), &changes));
        assert_eq!(verify(&all_keys(), &jwt).await.err(), expected, "{changes}");
    }
    let jwt = Signer::EdDsa.jwt(&header(Signer::EdDsa), &with(claims(), &json!({"exp": NOW - 1})));
    let strict = verifier(&all_keys()).with_leeway(Duration::ZERO);
    assert_eq!(strict.verify(jwt).await.unwrap_err(), Error::Expired);
    // `null` in the JSON itself.
    let null = claims().to_string().replace(&(NOW + 600).to_string(), "null");
    let message = format!("{}.{}", base64url(header(Signer::EdDsa).to_string()), base64url(null));
    let jwt = format!("{message}.{}", base64url(Signer::EdDsa.sign(message.as_bytes())));
    assert_eq!(verify(&all_keys(), &jwt).await.unwrap_err(), exp);
}

/// V1
#[tokio::test]
async fn malformed_tokens_are_refused() {
    let good = Signer::EdDsa.jwt(&header(Signer::EdDsa), &claims());
    let [head, body, signature] = good.split('.').collect::<Vec<_>>()[..] else { panic!("{good}") };
    let other = base64url(with(claims(), &json!({"sub": "admin"})).to_string());
    for (jwt, expected) in [
        (String::new(), VerifyError::Malformed),
        ("sk-selam-1".to_owned(), VerifyError::Malformed),
        ("..".to_owned(), VerifyError::Malformed),
        (format!("{head}.{body}"), VerifyError::Malformed),
        (format!("{good}."), VerifyError::Malformed),
        (format!("{good}.x.y"), VerifyError::Malformed),
        (format!("{head}.{body}.{signature}="), VerifyError::Malformed),
        (format!(" {good}"), VerifyError::Malformed),
        (format!("{head}.{body}.{signature}\n"), VerifyError::Malformed),
        (format!("{head}.W10.{signature}"), VerifyError::Malformed),
        (format!("{head}.{body}."), VerifyError::Signature),
        (format!("{head}.{other}.{signature}"), VerifyError::Signature),
        (format!("{good}{}", "A".repeat(8 * 1024)), VerifyError::TooLong),
    ] {
        assert_eq!(verify(&all_keys(), &jwt).await.unwrap_err(), expected, "{jwt}");
    }
    // Headers that the key has signed.
    for (header, expected) in [
        (r#"["EdDSA","EdDSA","JWT",null]"#, VerifyError::Malformed),
        (r#"{"alg":"EdDSA","alg":"EdDSA"}"#, VerifyError::Malformed),
        (r#"{"alg":"EdDSA","crit":null}"#, VerifyError::Critical),
    ] {
        let message = format!("{}.{body}", base64url(header));
        let jwt = format!("{message}.{}", base64url(Signer::EdDsa.sign(message.as_bytes())));
        assert_eq!(verify(&all_keys(), &jwt).await.unwrap_err(), expected, "{header}");
    }
    // Up to the limit, to the byte.
    let padded = |length: usize| with(claims(), &json!({"x": "x".repeat(length)}));
    let jwt = |length| Signer::EdDsa.jwt(&header(Signer::EdDsa), &padded(length));
    let fits = (5000..6200).rev().find(|length| jwt(*length).len() <= 8192).unwrap();
    assert!(jwt(fits).len() > 8188 && verify(&all_keys(), &jwt(fits)).await.is_ok());
    assert_eq!(verify(&all_keys(), &jwt(fits + 3)).await.unwrap_err(), VerifyError::TooLong);
}

/// V2
#[tokio::test]
async fn sets_hold_many_kinds_of_keys() {
    let (rsa, ec) = (Signer::Rs256, Signer::Es256);
    let junk = [
        json!({"kty": "oct", "k": "c2VjcmV0", "kid": "RS256"}),
        json!({"kty": "AKP", "alg": "ML-DSA-44", "pub": "AAAA", "kid": "RS256"}),
        json!({"kty": "RSA", "kid": 7, "n": "AQAB", "e": "AQAB"}),
        json!({"kty": "RSA", "kid": "RS256", "n": "AQAB", "e": "AQAB"}),
        json!({"kty": "RSA", "kid": "RS256", "n": "not base64!", "e": "AQAB"}),
        json!({"kty": "EC", "crv": "secp256k1", "kid": "ES256", "x": "AAAA", "y": "AAAA"}),
        json!({"kty": "EC", "crv": "P-256", "kid": "ES256", "x": "AAAA", "y": "AAAA"}),
        json!({"kty": "OKP", "crv": "X25519", "kid": "EdDSA", "x": base64url(ED25519_KEY)}),
        json!({"kty": "OKP", "crv": "Ed25519", "kid": "EdDSA", "x": "AAAA"}),
        json!("RSA"),
        json!({}),
    ];
    let [rsa_jwt, ec_jwt] = [rsa, ec].map(|signer| signer.jwt(&header(signer), &claims()));
    let keys = jwks(&[&junk[..], &[rsa.jwk(), ec.jwk()]].concat());
    assert!(verify(&keys, &rsa_jwt).await.is_ok() && verify(&keys, &ec_jwt).await.is_ok());
    for (text, kind) in [
        (jwks(&junk), ConfigErrorKind::InvalidPublicKey),
        (jwks(&[]), ConfigErrorKind::InvalidPublicKey),
        ("{}".to_owned(), ConfigErrorKind::InvalidPublicKey),
        (" \n".to_owned(), ConfigErrorKind::Empty),
        ("s3cr3t".to_owned(), ConfigErrorKind::InvalidPublicKey),
        (include_str!("../keys/rsa.pem").to_owned(), ConfigErrorKind::InvalidPublicKey),
        (pem("PUBLIC KEY", b"\x30\x00"), ConfigErrorKind::InvalidPublicKey),
    ] {
        assert_eq!(IssuerKeys::fixed(&text).unwrap_err().kind(), &kind, "{text}");
    }

    // A key is used for what its publisher says.
    for (changes, expected) in [
        (json!({"use": "enc"}), Some(VerifyError::UnknownKey)),
        (json!({"use": "sig"}), None),
        (json!({"use": null}), None),
        (json!({"key_ops": ["encrypt"]}), Some(VerifyError::UnknownKey)),
        (json!({"key_ops": ["sign", "verify"]}), None),
        (json!({"alg": "RS256"}), None),
        (json!({"alg": "RS512"}), Some(VerifyError::Algorithm)),
        (json!({"alg": "RSA-OAEP-256"}), Some(VerifyError::UnknownKey)),
        (json!({"alg": "HS256"}), Some(VerifyError::UnknownKey)),
        (json!({"kid": null}), None),
    ] {
        let keys = jwks(&[with(rsa.jwk(), &changes), ec.jwk()]);
        assert_eq!(verify(&keys, &rsa_jwt).await.err(), expected, "{changes}");
    }

    // Several keys with one id, or JWTs without one.
    let renamed = |signer: Signer| with(signer.jwk(), &json!({"kid": "same"}));
    let decoy = json!({"kty": "OKP", "crv": "Ed25519", "kid": "same", "x": base64url([7; 32])});
    let keys = jwks(&[decoy, renamed(ec), renamed(rsa), renamed(Signer::EdDsa)]);
    for signer in [rsa, ec, Signer::EdDsa] {
        for kid in [json!("same"), json!(null)] {
            let jwt = signer.jwt(&with(header(signer), &json!({ "kid": kid })), &claims());
            assert!(verify(&keys, &jwt).await.is_ok(), "{signer:?} {kid}");
        }
    }
    // A leading zero in front of the modulus, as some publishers have it.
    let n = [vec![0], rsa_numbers().n].concat();
    let keys = jwks(&[with(rsa.jwk(), &json!({"n": base64url(n)}))]);
    assert!(verify(&keys, &rsa_jwt).await.is_ok());
}

/// An issuer in process, whose answers a test sets.
#[derive(Clone, Default)]
struct Issuer(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// The key set, with a `Cache-Control`; or a status.
    answer: Mutex<Option<Result<(String, &'static str), u16>>>,
    discovered: AtomicU64,
    fetched: AtomicU64,
    /// Holds answers back until it is notified, if `holds`.
    gate: Notify,
    holds: Mutex<bool>,
    jwks_uri: Mutex<Option<String>>,
}

impl Issuer {
    fn publishing(keys: &[Signer]) -> Self {
        let issuer = Self::default();
        issuer.publish(keys);
        issuer
    }

    fn publish(&self, keys: &[Signer]) {
        let keys: Vec<_> = keys.iter().map(|key| key.jwk()).collect();
        *self.0.answer.lock().unwrap() = Some(Ok((jwks(&keys), "max-age=300")));
    }

    fn fail(&self, status: u16) {
        *self.0.answer.lock().unwrap() = Some(Err(status));
    }

    fn fetched(&self) -> u64 {
        self.0.fetched.load(Ordering::SeqCst)
    }

    fn hold(&self, holds: bool) {
        *self.0.holds.lock().unwrap() = holds;
        self.0.gate.notify_waiters();
    }

    async fn answer(self, request: Request<Full<Bytes>>) -> Response<Full<Bytes>> {
        assert_eq!(request.method(), http::Method::GET);
        let shared = &*self.0;
        if request.uri().path() == "/.well-known/openid-configuration" {
            shared.discovered.fetch_add(1, Ordering::SeqCst);
            let jwks_uri = shared.jwks_uri.lock().unwrap().clone();
            let jwks_uri = jwks_uri.unwrap_or_else(|| format!("{ISSUER}/jwks"));
            let body = json!({ "issuer": ISSUER, "jwks_uri": jwks_uri }).to_string();
            return Response::new(Full::from(body));
        }
        assert_eq!(request.uri(), "https://login.example/jwks");
        shared.fetched.fetch_add(1, Ordering::SeqCst);
        let answer = shared.answer.lock().unwrap().clone().unwrap();
        let opened = shared.gate.notified();
        if *shared.holds.lock().unwrap() {
            opened.await;
        }
        match answer {
            Ok((keys, control)) => {
                Response::builder().header("cache-control", control).body(Full::from(keys)).unwrap()
            }
            Err(status) => {
                let response = Response::builder().status(StatusCode::from_u16(status).unwrap());
                // No other status than 200 makes the body a key set.
                response
                    .header("location", "https://login.example/jwks")
                    .body(Full::from(all_keys()))
                    .unwrap()
            }
        }
    }

    fn client(
        &self,
    ) -> impl tower::Service<
        Request<Full<Bytes>>,
        Response = Response<Full<Bytes>>,
        Error = Infallible,
        Future: Send,
    > + Clone
    + Send
    + 'static {
        let issuer = self.clone();
        tower::service_fn(move |request| {
            let issuer = issuer.clone();
            async move { Ok::<_, Infallible>(issuer.answer(request).await) }
        })
    }

    fn verifier(&self, clock: &TestClock) -> JwtVerifier {
        let keys = IssuerKeys::discover::<_, Full<Bytes>, _>(ISSUER, self.client()).unwrap();
        JwtVerifier::new(keys.with_clock(clock.clone()), [AUDIENCE]).with_issuer(ISSUER)
    }
}

/// A JWT that is valid for longer than any test lasts.
fn lasting(signer: Signer) -> String {
    signer.jwt(&header(signer), &with(claims(), &json!({"exp": NOW + 1_000_000})))
}

/// Lets spawned tasks run.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

fn retry_after(result: Result<Claims, VerifyError>) -> Duration {
    match result {
        Err(VerifyError::Unavailable { retry_after, .. }) => retry_after,
        other => panic!("{other:?}"),
    }
}

/// V3: ten thousand users cost one fetch, and a cancelled one loses nothing.
#[tokio::test(start_paused = true)]
async fn all_callers_share_one_fetch() {
    let issuer = Issuer::publishing(&[Signer::Es256]);
    let verifier = issuer.verifier(&clock());
    issuer.hold(true);
    let users = (0..10_000).map(|user| {
        let claims = with(claims(), &json!({ "sub": format!("user-{user}") }));
        let (verifier, jwt) = (verifier.clone(), Signer::Es256.jwt(&header(Signer::Es256), &claims));
        tokio::spawn(async move { verifier.verify(jwt).await.unwrap().text("sub").unwrap().into_owned() })
    });
    let mut users: Vec<_> = users.collect();
    settle().await;
    // The one that started the fetch among them.
    users[0].abort();
    issuer.hold(false);
    for (number, user) in users.drain(..).enumerate().skip(1) {
        assert_eq!(user.await.unwrap(), format!("user-{number}"));
    }
    assert_eq!((issuer.fetched(), issuer.0.discovered.load(Ordering::SeqCst)), (1, 1));
}

/// V3
#[tokio::test(start_paused = true)]
async fn rotated_keys_are_found() {
    let (clock, issuer) = (clock(), Issuer::publishing(&[Signer::EdDsa]));
    let verifier = issuer.verifier(&clock);
    assert!(verifier.verify(lasting(Signer::EdDsa)).await.is_ok());
    // A JWT of a foreign issuer fetches nothing, nor does one that has expired.
    for changes in [json!({"iss": "https://evil.example"}), json!({"exp": NOW - 600}), json!({"aud": "x"})] {
        let jwt = Signer::Es256.jwt(&header(Signer::Es256), &with(claims(), &changes));
        assert!(!matches!(verifier.verify(jwt).await, Ok(_) | Err(VerifyError::UnknownKey)));
    }
    assert_eq!(issuer.fetched(), 1);
    // The new key is fetched for the first JWT that names it, however soon after a fetch for another reason.
    issuer.publish(&[Signer::Es256, Signer::EdDsa]);
    assert!(verifier.verify(lasting(Signer::Es256)).await.is_ok());
    assert!(verifier.verify(lasting(Signer::EdDsa)).await.is_ok());
    assert_eq!(issuer.fetched(), 2);
    // An unknown one is looked for, and known to be absent then. Others have to wait until it is not too soon: the issuer may
    // have published them meanwhile.
    clock.jump(31 * SECOND);
    assert_eq!(verifier.verify(lasting(Signer::Rs256)).await.unwrap_err(), VerifyError::UnknownKey);
    assert_eq!(issuer.fetched(), 3);
    clock.jump(10 * SECOND);
    assert_eq!(verifier.verify(lasting(Signer::Rs256)).await.unwrap_err(), VerifyError::UnknownKey);
    assert_eq!(retry_after(verifier.verify(lasting(Signer::Es384)).await), 20 * SECOND);
    issuer.publish(&[Signer::Es384]);
    assert_eq!(issuer.fetched(), 3);
    clock.jump(20 * SECOND);
    assert!(verifier.verify(lasting(Signer::Es384)).await.is_ok());
    // The withdrawn one is refused from now on: known keys whose signature does not match cause no fetch.
    clock.jump(31 * SECOND);
    assert_eq!(verifier.verify(lasting(Signer::Es256)).await.unwrap_err(), VerifyError::UnknownKey);
    let forged = format!("{}AAAA", lasting(Signer::Es384));
    assert_eq!(verifier.verify(forged).await.unwrap_err(), VerifyError::Signature);
    assert_eq!(issuer.fetched(), 5);
}

/// V3: a fetch that was under way when a JWT arrived says nothing of its key.
#[tokio::test(start_paused = true)]
async fn an_earlier_fetch_proves_no_absence() {
    let (clock, issuer) = (clock(), Issuer::publishing(&[Signer::EdDsa]));
    let verifier = issuer.verifier(&clock);
    // One that began later does, for whatever reason.
    assert_eq!(verifier.verify(lasting(Signer::Es384)).await.unwrap_err(), VerifyError::UnknownKey);
    assert_eq!(issuer.fetched(), 1);
    clock.jump(31 * SECOND);
    issuer.hold(true);
    let first = tokio::spawn({
        let verifier = verifier.clone();
        async move { verifier.verify(lasting(Signer::Rs256)).await }
    });
    settle().await;
    // The answer is on its way, without the new key.
    issuer.publish(&[Signer::Es256, Signer::EdDsa]);
    clock.jump(SECOND);
    let second = tokio::spawn({
        let verifier = verifier.clone();
        async move { verifier.verify(lasting(Signer::Es256)).await }
    });
    settle().await;
    issuer.hold(false);
    assert_eq!(first.await.unwrap().unwrap_err(), VerifyError::UnknownKey);
    assert_eq!(retry_after(second.await.unwrap()), 29 * SECOND);
    clock.jump(29 * SECOND);
    assert!(verifier.verify(lasting(Signer::Es256)).await.is_ok());
}

/// V3: which ids the issuer lacks is remembered, up to a limit.
#[tokio::test(start_paused = true)]
async fn absent_keys_are_remembered() {
    let issuer = Issuer::publishing(&[Signer::EdDsa]);
    let verifier = issuer.verifier(&clock());
    let verify = |id: u32| {
        let header = with(header(Signer::EdDsa), &json!({ "kid": id.to_string() }));
        let (verifier, jwt) = (verifier.clone(), Signer::EdDsa.jwt(&header, &claims()));
        async move { verifier.verify(jwt).await.unwrap_err() }
    };
    issuer.hold(true);
    let first: Vec<_> = (0..70).map(|id| tokio::spawn(verify(id))).collect();
    settle().await;
    issuer.hold(false);
    for error in first {
        assert_eq!(error.await.unwrap(), VerifyError::UnknownKey);
    }
    let mut remembered = 0;
    for id in (0..70).rev() {
        remembered += usize::from(verify(id).await == VerifyError::UnknownKey);
    }
    assert_eq!(remembered, 64);
    assert_eq!(issuer.fetched(), 2);
}

/// V3
#[tokio::test(start_paused = true)]
async fn stale_keys_are_refreshed_in_the_background() {
    let (clock, issuer) = (clock(), Issuer::publishing(&[Signer::EdDsa, Signer::Es256]));
    let verifier = issuer.verifier(&clock);
    assert!(verifier.verify(lasting(Signer::EdDsa)).await.is_ok());
    clock.jump(299 * SECOND);
    assert!(verifier.verify(lasting(Signer::EdDsa)).await.is_ok());
    settle().await;
    assert_eq!(issuer.fetched(), 1);
    // At 300 seconds, the keys are used once more, and fetched.
    issuer.publish(&[Signer::EdDsa]);
    clock.jump(SECOND);
    assert!(verifier.verify(lasting(Signer::Es256)).await.is_ok());
    settle().await;
    assert_eq!(issuer.fetched(), 2);
    clock.jump(31 * SECOND);
    assert_eq!(verifier.verify(lasting(Signer::Es256)).await.unwrap_err(), VerifyError::UnknownKey);
    assert_eq!(issuer.fetched(), 3);
    // After an idle period, withdrawn keys are not used even once.
    issuer.publish(&[Signer::Es384]);
    clock.jump(HOUR);
    assert_eq!(verifier.verify(lasting(Signer::EdDsa)).await.unwrap_err(), VerifyError::UnknownKey);
    assert!(issuer.fetched() >= 4);
}

/// V3
#[tokio::test(start_paused = true)]
async fn an_outage_is_survived_for_a_day() {
    let (clock, issuer) = (clock(), Issuer::publishing(&[Signer::EdDsa]));
    let verifier = issuer.verifier(&clock);
    issuer.fail(503);
    // Without keys, nothing is known; attempts are spaced.
    assert_eq!(retry_after(verifier.verify(lasting(Signer::EdDsa)).await), SECOND);
    assert_eq!(retry_after(verifier.verify(lasting(Signer::EdDsa)).await), SECOND);
    assert_eq!(issuer.0.discovered.load(Ordering::SeqCst), 1);
    clock.jump(SECOND);
    assert_eq!(retry_after(verifier.verify(lasting(Signer::EdDsa)).await), 2 * SECOND);
    clock.jump(2 * SECOND);
    issuer.publish(&[Signer::EdDsa]);
    assert!(verifier.verify(lasting(Signer::EdDsa)).await.is_ok());

    issuer.fail(302);
    clock.jump(300 * SECOND);
    assert!(verifier.verify(lasting(Signer::EdDsa)).await.is_ok());
    settle().await;
    // An unknown key is no reason to try earlier.
    let attempts = issuer.0.discovered.load(Ordering::SeqCst);
    retry_after(verifier.verify(lasting(Signer::Es256)).await);
    assert_eq!(issuer.0.discovered.load(Ordering::SeqCst), attempts);
    let mut passed = Duration::ZERO;
    while passed < 24 * HOUR - 600 * SECOND {
        clock.jump(600 * SECOND);
        passed += 600 * SECOND;
        assert!(verifier.verify(lasting(Signer::EdDsa)).await.is_ok(), "{passed:?}");
        settle().await;
        // A wrong signature is wrong in an outage, too.
        let forged = format!("{}AAAA", lasting(Signer::EdDsa));
        assert_eq!(verifier.verify(forged).await.unwrap_err(), VerifyError::Signature);
    }
    // Of an unknown key, nothing is known.
    clock.jump(61 * SECOND);
    retry_after(verifier.verify(lasting(Signer::Es256)).await);
    clock.jump(600 * SECOND);
    retry_after(verifier.verify(lasting(Signer::EdDsa)).await);
    issuer.publish(&[Signer::EdDsa]);
    clock.jump(61 * SECOND);
    assert!(verifier.verify(lasting(Signer::EdDsa)).await.is_ok());
}

/// V3
#[tokio::test(start_paused = true)]
async fn answers_that_are_no_key_set_are_failures() {
    let long = format!("{}{}", all_keys(), " ".repeat(64 * 1024));
    for answer in [
        Err(404),
        Err(302),
        Err(304),
        Err(500),
        Ok(("<html>".to_owned(), "")),
        Ok(("{\"keys\":[]}".to_owned(), "")),
        Ok((long, "")),
    ] {
        let (clock, issuer) = (clock(), Issuer::default());
        *issuer.0.answer.lock().unwrap() = Some(answer.clone());
        let verifier = issuer.verifier(&clock);
        retry_after(verifier.verify(lasting(Signer::EdDsa)).await);
        issuer.publish(&[Signer::EdDsa]);
        clock.jump(SECOND);
        assert!(verifier.verify(lasting(Signer::EdDsa)).await.is_ok(), "{answer:?}");
    }
    // An issuer that never answers.
    let (clock, issuer) = (clock(), Issuer::publishing(&[Signer::EdDsa]));
    issuer.hold(true);
    retry_after(issuer.verifier(&clock).verify(lasting(Signer::EdDsa)).await);
    let keys = IssuerKeys::at_url::<_, Full<Bytes>, _>(&format!("{ISSUER}/jwks"), issuer.client()).unwrap();
    let verifier = JwtVerifier::new(keys.with_clock(clock.clone()), [AUDIENCE]);
    retry_after(verifier.verify(lasting(Signer::EdDsa)).await);
    // A discovery document that leads to plain http, or elsewhere.
    for url in ["http://login.example/jwks", "http://127.0.0.1/jwks", "/jwks", "file:///etc/passwd"] {
        let issuer = Issuer::publishing(&[Signer::EdDsa]);
        *issuer.0.jwks_uri.lock().unwrap() = Some(url.to_owned());
        retry_after(issuer.verifier(&clock).verify(lasting(Signer::EdDsa)).await);
        assert_eq!(issuer.fetched(), 0, "{url}");
    }
    // One of another issuer, which may differ by a slash.
    let issuer = Issuer::publishing(&[Signer::EdDsa]);
    let slash = format!("{ISSUER}/");
    let keys = IssuerKeys::discover::<_, Full<Bytes>, _>(&slash, issuer.client()).unwrap().with_clock(clock);
    let jwt = Signer::EdDsa.jwt(&header(Signer::EdDsa), &with(claims(), &json!({ "iss": slash })));
    retry_after(JwtVerifier::new(keys, [AUDIENCE]).verify(jwt).await);
    assert_eq!(issuer.fetched(), 0);
}

#[tokio::test]
async fn urls_must_be_https() {
    let client = Issuer::default().client();
    for (url, kind) in [
        ("http://login.example", ConfigErrorKind::NotHttps),
        ("login.example", ConfigErrorKind::InvalidUrl),
        ("https://user@login.example", ConfigErrorKind::UserInfo),
        ("https://login.example#x", ConfigErrorKind::UnexpectedPart),
        ("", ConfigErrorKind::Empty),
    ] {
        let discovered = IssuerKeys::discover::<_, Full<Bytes>, _>(url, client.clone());
        assert_eq!(discovered.unwrap_err().kind(), &kind, "{url}");
        let at_url = IssuerKeys::at_url::<_, Full<Bytes>, _>(url, client.clone());
        assert_eq!(at_url.unwrap_err().kind(), &kind, "{url}");
    }
    let url = "https://login.example/?x=1";
    assert!(IssuerKeys::discover::<_, Full<Bytes>, _>(url, client.clone()).is_err());
    assert!(IssuerKeys::at_url::<_, Full<Bytes>, _>(url, client.clone()).is_ok());
    for (url, is_ok) in [("http://127.0.0.1:1", true), ("http://login.example", false)] {
        let allowed = IssuerKeys::discover_allow_insecure_loopback::<_, Full<Bytes>, _>(url, client.clone());
        assert_eq!(allowed.is_ok(), is_ok);
        let allowed = IssuerKeys::at_url_allow_insecure_loopback::<_, Full<Bytes>, _>(url, client.clone());
        assert_eq!(allowed.is_ok(), is_ok);
    }
}

/// V3
#[tokio::test]
async fn files_are_read_again() {
    let directory = Directory::new();
    let path = directory.file();
    write_old(&path, Signer::EdDsa.pem());
    let clock = clock();
    let keys = IssuerKeys::in_file(&path).unwrap().with_clock(clock.clone());
    let verifier = JwtVerifier::new(keys, [AUDIENCE]);
    assert!(verifier.verify(lasting(Signer::EdDsa)).await.is_ok());
    write_old(&path, jwks(&[Signer::Es256.jwk()]));
    clock.jump(2 * SECOND);
    assert!(verifier.verify(lasting(Signer::Es256)).await.is_ok());
    // An invalid file leaves the keys as they are, for however long.
    let endless = |signer: Signer| signer.jwt(&header(signer), &with(claims(), &json!({"exp": NOW * 2})));
    write_old(&path, "{}");
    for _ in 0..3 {
        clock.jump(48 * HOUR);
        assert!(verifier.verify(endless(Signer::Es256)).await.is_ok());
    }
    // It is read again soon after it was repaired, however long that took.
    for _ in 0..10 {
        clock.jump(60 * SECOND);
        assert!(verifier.verify(endless(Signer::EdDsa)).await.is_err());
    }
    write_old(&path, jwks(&[Signer::EdDsa.jwk()]));
    clock.jump(2 * SECOND);
    assert!(verifier.verify(endless(Signer::EdDsa)).await.is_ok());

    write_old(&path, "{}");
    let error = IssuerKeys::in_file(&path).unwrap_err();
    assert_eq!(error.file(), Some(&*path));
    assert!(error.to_string().contains("has no usable public key"), "{error}");
}

/// V1: random text is refused without a panic.
#[test]
fn no_token_panics() {
    use proptest::prelude::*;
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let verifier = verifier(&all_keys());
    proptest!(|(head in "\\PC{0,40}", body in "\\PC{0,40}", raw in "[ -~]{0,80}", signature in "[A-Za-z0-9_-]{0,90}")| {
        let jwt = format!("{}.{}.{signature}", base64url(head), base64url(body));
        for jwt in [jwt, raw] {
            prop_assert!(runtime.block_on(verifier.verify(jwt)).is_err());
        }
    });
}
