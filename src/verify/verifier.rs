//! [`JwtVerifier`]: the rules that a caller's JWT has to meet.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    Claims, IssuerKeys, VerifyError,
    keys::{Algorithm, Verdict, VerifyingKeys},
};

/// The longest JWT. Most have less than 2 KiB.
const MAX_LENGTH: usize = 8 * 1024;

const DEFAULT_LEEWAY: Duration = Duration::from_secs(60);

/// Verifies the JWTs of callers. See the [module docs](super) for what is checked. Cheap to clone.
///
/// It keeps nothing of a JWT, and identifies nobody: the caller's name is a [claim](Claims::text) of your choice, together with the
/// [issuer](Claims::issuer).
#[derive(Clone, Debug)]
pub struct JwtVerifier {
    keys: IssuerKeys,
    rules: Arc<Rules>,
}

#[derive(Clone, Debug)]
struct Rules {
    audiences: Vec<String>,
    issuer: Option<String>,
    leeway: Duration,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    typ: Option<String>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// A JWT in its parts, decoded.
struct Parts<'a> {
    header: Header,
    claims: Map<String, Value>,
    message: &'a [u8],
    signature: Vec<u8>,
}

impl JwtVerifier {
    /// Accepts JWTs that one of these keys verifies and that are for one of these audiences, which are compared with the claim
    /// `aud`.
    #[must_use]
    pub fn new<A: Into<String>>(keys: IssuerKeys, audiences: impl IntoIterator<Item = A>) -> Self {
        let audiences = audiences.into_iter().map(Into::into).collect();
        Self { keys, rules: Arc::new(Rules { audiences, issuer: None, leeway: DEFAULT_LEEWAY }) }
    }

    /// Requires that the claim `iss` is exactly this, to the last slash. By default it is not looked at, because whoever has the
    /// key may issue JWTs in any name.
    #[must_use]
    pub fn with_issuer(mut self, issuer: impl Into<String>) -> Self {
        Arc::make_mut(&mut self.rules).issuer = Some(issuer.into());
        self
    }

    /// Sets how far the clocks of issuer and server may differ; 60 seconds by default. A JWT is accepted for so long before `nbf`
    /// and after `exp`.
    #[must_use]
    pub fn with_leeway(mut self, leeway: Duration) -> Self {
        Arc::make_mut(&mut self.rules).leeway = leeway;
        self
    }

    /// Verifies a JWT in the compact form, without `Bearer`. Fetches the issuer's keys if that is necessary: see [`IssuerKeys`].
    ///
    /// # Errors
    ///
    /// The first rule that it does not meet, or [`Unavailable`](VerifyError::Unavailable) if that cannot be known now.
    ///
    /// # Cancel safety
    ///
    /// A fetch continues without its caller, and its result is kept.
    pub async fn verify(&self, jwt: impl AsRef<[u8]> + Send) -> Result<Claims, VerifyError> {
        let begun = self.keys.begun();
        let Parts { header, claims, message, signature } = Parts::parse(jwt.as_ref())?;
        let algorithm = header.check()?;
        let expires_at = self.rules.check(&claims, self.keys.now().wall)?;
        let check = |keys: &VerifyingKeys| keys.check(header.kid.as_deref(), algorithm, message, &signature);
        let mut verdict = check(&*self.keys.current().await?);
        if verdict == Verdict::Unknown {
            verdict = check(&*self.keys.newer(begun).await?);
        }
        match verdict {
            Verdict::Valid => Ok(Claims::new(claims, expires_at)),
            Verdict::Invalid => Err(VerifyError::Signature),
            Verdict::WrongAlgorithm => Err(VerifyError::Algorithm),
            Verdict::Unknown => {
                Err(self.keys.unknown(header.kid.as_deref().unwrap_or_default().as_bytes(), begun))
            }
        }
    }
}

impl<'a> Parts<'a> {
    fn parse(jwt: &'a [u8]) -> Result<Self, VerifyError> {
        if jwt.len() > MAX_LENGTH {
            return Err(VerifyError::TooLong);
        }
        let mut parts = jwt.split(|byte| *byte == b'.');
        let parts = [parts.next(), parts.next(), parts.next(), parts.next()];
        let [Some(header), Some(claims), Some(signature), None] = parts else {
            return Err(VerifyError::Malformed);
        };
        let message = &jwt[..header.len() + 1 + claims.len()];
        let decode = |part| BASE64_URL_SAFE_NO_PAD.decode(part).map_err(|_| VerifyError::Malformed);
        let malformed = |_| VerifyError::Malformed;
        Ok(Self {
            header: serde_json::from_slice(&decode(header)?).map_err(malformed)?,
            claims: serde_json::from_slice(&decode(claims)?).map_err(malformed)?,
            message,
            signature: decode(signature)?,
        })
    }
}

impl Header {
    /// The algorithm of the signature. Which keys it may be checked with is up to the keys.
    fn check(&self) -> Result<Algorithm, VerifyError> {
        let algorithm = Algorithm::of(&self.alg).ok_or(VerifyError::Algorithm)?;
        if self.others.contains_key("crit") {
            return Err(VerifyError::Critical);
        }
        let Some(kind) = &self.typ else { return Ok(algorithm) };
        let kind = kind.to_ascii_lowercase();
        match kind.strip_prefix("application/").unwrap_or(&kind) {
            "jwt" | "at+jwt" => Ok(algorithm),
            _ => Err(VerifyError::Type),
        }
    }
}

impl Rules {
    /// Checks the claims, and returns when the JWT expires.
    fn check(&self, claims: &Map<String, Value>, now: SystemTime) -> Result<SystemTime, VerifyError> {
        let wrong = |name| VerifyError::Claim { name };
        let expires_at = date(claims, "exp")?.ok_or(wrong("exp"))?;
        if expires_at.checked_add(self.leeway).is_some_and(|expires_at| expires_at <= now) {
            return Err(VerifyError::Expired);
        }
        if let Some(begins_at) = date(claims, "nbf")?
            && now.checked_add(self.leeway).is_some_and(|now| begins_at > now)
        {
            return Err(VerifyError::NotYetValid);
        }
        if let Some(issuer) = &self.issuer {
            match claims.get("iss") {
                Some(Value::String(iss)) if iss == issuer => {}
                Some(Value::String(_)) => return Err(VerifyError::Issuer),
                _ => return Err(wrong("iss")),
            }
        }
        let is_ours = |audience: &str| self.audiences.iter().any(|ours| ours == audience);
        let is_for_us = match claims.get("aud") {
            Some(Value::String(audience)) => is_ours(audience),
            Some(Value::Array(audiences)) => audiences.iter().filter_map(Value::as_str).any(is_ours),
            _ => return Err(wrong("aud")),
        };
        if is_for_us { Ok(expires_at) } else { Err(VerifyError::Audience) }
    }
}

/// A `NumericDate` ([RFC 7519 section 2](https://www.rfc-editor.org/rfc/rfc7519#section-2)), which may have a fraction; `None` if
/// the claim is missing.
fn date(claims: &Map<String, Value>, name: &'static str) -> Result<Option<SystemTime>, VerifyError> {
    let Some(value) = claims.get(name) else { return Ok(None) };
    let seconds = value.as_f64().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let date = seconds.and_then(|seconds| UNIX_EPOCH.checked_add(seconds));
    date.map(Some).ok_or(VerifyError::Claim { name })
}
