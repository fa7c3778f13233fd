//! Verifies JWTs that callers of a server present: feature `verify`.
//!
//! A server that forwards requests to SelamAPI first has to know who calls. [`JwtVerifier`] checks the JWT of the app's own login
//! against the public keys of its issuer, which [`IssuerKeys`] fetches and caches, and returns its [`Claims`]:
//!
//! ```
//! # use std::convert::Infallible;
//! use bytes::Bytes;
//! use http::{Request, Response};
//! use http_body_util::Full;
//! use tower_selam::verify::{IssuerKeys, JwtVerifier, VerifyError};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! // Any client that is a Tower service, such as hyper-util's. It should not follow redirects.
//! let client = tower::service_fn(|request: Request<Full<Bytes>>| async move {
//!     // …
//! #   let body = match request.uri().path() {
//! #       "/.well-known/openid-configuration" =>
//! #           r#"{"issuer":"https://login.example","jwks_uri":"https://login.example/jwks"}"#,
//! #       _ => r#"{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"1","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#,
//! #   };
//! #   Ok::<_, Infallible>(Response::new(Full::<Bytes>::from(body)))
//! });
//! let issuer = "https://login.example";
//! let keys = IssuerKeys::discover::<_, Full<Bytes>, _>(issuer, client)?;
//! let verifier = JwtVerifier::new(keys, ["my-app"]).with_issuer(issuer);
//!
//! // The signature of this one is missing: {"alg":"none"} . {"sub":"selam"}
//! let forged = verifier.verify("eyJhbGciOiJub25lIn0.eyJzdWIiOiJzZWxhbSJ9.").await;
//! assert_eq!(forged.unwrap_err(), VerifyError::Algorithm);
//! # Ok::<(), tower_selam::BoxError>(())
//! # }).unwrap();
//! ```
//!
//! Together, the claim `iss` and the claim that names the user identify a caller: the same `sub` of another issuer is another user.
//! [`SubjectTokens`](crate::oauth::SubjectTokens) exchanges verified JWTs for JWTs of the same users at SelamAPI.
//!
//! # What is checked
//!
//! In this order. Claims are compared before the key is looked up, so that a JWT of somebody else's issuer fetches nothing.
//!
//! | What | Accepted | Source |
//! |---|---|---|
//! | length | up to 8 KiB | |
//! | form | three parts in base64url, header and claims JSON objects | [RFC 7515 section 7.1](https://www.rfc-editor.org/rfc/rfc7515#section-7.1) |
//! | `alg` | RS256 to RS512, PS256 to PS512, ES256, ES384 and EdDSA; never `none`, nor an HMAC, whose secret would be a published key | [RFC 8725 section 3.1](https://www.rfc-editor.org/rfc/rfc8725#section-3.1) |
//! | `crit` | absent, because no extension is supported | [RFC 7515 section 4.1.11](https://www.rfc-editor.org/rfc/rfc7515#section-4.1.11) |
//! | `typ` | absent, `JWT` or `at+jwt`, so that a logout token or a DPoP proof is no login | [RFC 8725 section 3.11](https://www.rfc-editor.org/rfc/rfc8725#section-3.11) |
//! | `exp` | required, a number, not past | [RFC 7519 section 4.1.4](https://www.rfc-editor.org/rfc/rfc7519#section-4.1.4) |
//! | `nbf` | absent, or a number that is not in the future | [RFC 7519 section 4.1.5](https://www.rfc-editor.org/rfc/rfc7519#section-4.1.5) |
//! | `iss` | exactly the issuer, if [one is required](JwtVerifier::with_issuer) | [RFC 7519 section 4.1.1](https://www.rfc-editor.org/rfc/rfc7519#section-4.1.1) |
//! | `aud` | one of the audiences, alone or in an array | [RFC 7519 section 4.1.3](https://www.rfc-editor.org/rfc/rfc7519#section-4.1.3) |
//! | key | one with the `kid` of the header, or any if either has none; the key decides which algorithms it verifies | [RFC 7517 section 4](https://www.rfc-editor.org/rfc/rfc7517#section-4) |
//! | signature | | |
//!
//! Both times allow for clocks that differ by up to [60 seconds](JwtVerifier::with_leeway). Keys and URLs in the header (`jwk`, `jku`,
//! `x5u`) are ignored. A key is used if it is RSA of 2048 to 8192 bits, EC on P-256 or P-384, or Ed25519, and neither `use` nor
//! `key_ops` says that it is for something else. Others are ignored, symmetric ones among them.

mod claims;
mod error;
mod fetch;
mod issuer_keys;
mod keys;
mod verifier;

pub use self::{claims::Claims, error::VerifyError, issuer_keys::IssuerKeys, verifier::JwtVerifier};
