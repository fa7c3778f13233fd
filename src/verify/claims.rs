//! [`Claims`]: what a verified JWT says.

use std::{borrow::Cow, fmt, sync::Arc, time::SystemTime};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// The claims of a verified JWT. Cheap to clone.
///
/// A claim is named by its name, or by a JSON pointer if it is part of another one: `/realm_access/roles`
/// ([RFC 6901](https://www.rfc-editor.org/rfc/rfc6901)). `Debug` shows the names alone, because claims are personal data.
#[derive(Clone)]
pub struct Claims {
    all: Arc<Value>,
    expires_at: SystemTime,
}

impl Claims {
    pub(super) fn new(all: Map<String, Value>, expires_at: SystemTime) -> Self {
        Self { all: Arc::new(Value::Object(all)), expires_at }
    }

    /// Returns a claim, if it is there and of the type `T`.
    #[must_use]
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        T::deserialize(self.value(name)?).ok()
    }

    /// Returns a claim as text, if it is a string that is not empty, or a whole number.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<Cow<'_, str>> {
        match self.value(name)? {
            Value::String(text) if !text.is_empty() => Some(Cow::Borrowed(text)),
            Value::Number(number) if !number.is_f64() => Some(Cow::Owned(number.to_string())),
            _ => None,
        }
    }

    /// Returns whether a claim has this value: is this text, number or Boolean, is an array with it, or, if the claim is
    /// `scope`, has it among its words ([RFC 8693 section 4.2](https://www.rfc-editor.org/rfc/rfc8693#section-4.2)).
    #[must_use]
    pub fn has(&self, name: &str, value: &str) -> bool {
        let is = |claim: &Value| match claim {
            Value::String(text) => text == value,
            Value::Number(_) | Value::Bool(_) => {
                serde_json::to_string(claim).is_ok_and(|claim| claim == value)
            }
            _ => false,
        };
        match self.value(name) {
            Some(Value::Array(items)) => items.iter().any(is),
            Some(Value::String(words)) if name == "scope" => words.split(' ').any(|word| word == value),
            claim => claim.is_some_and(is),
        }
    }

    /// Returns the issuer, the claim `iss`. It is among the verified ones only if the verifier
    /// [requires one](super::JwtVerifier::with_issuer); otherwise, it is what the holder of the key says.
    #[must_use]
    pub fn issuer(&self) -> Option<&str> {
        self.value("iss")?.as_str()
    }

    /// Returns when the JWT expires, the claim `exp`.
    #[must_use]
    pub fn expires_at(&self) -> SystemTime {
        self.expires_at
    }

    fn value(&self, name: &str) -> Option<&Value> {
        if name.starts_with('/') { self.all.pointer(name) } else { self.all.get(name) }
    }
}

impl fmt::Debug for Claims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.all.as_object().into_iter().flat_map(Map::keys);
        f.debug_set().entries(names).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use serde_json::json;

    use super::*;

    fn claims() -> Claims {
        let Value::Object(all) = json!({
            "iss": "https://login.example", "sub": "selam", "id": 7, "rate": 1.5, "empty": "", "verified": true,
            "scope": "chat audio", "groups": ["gold", 3], "realm": {"roles": ["admin"]}, "https://x/role": "editor",
        }) else {
            panic!("not an object")
        };
        Claims::new(all, UNIX_EPOCH)
    }

    /// V1
    #[test]
    fn claims_are_found_by_name_and_pointer() {
        let claims = claims();
        assert_eq!(claims.issuer(), Some("https://login.example"));
        assert_eq!(claims.get::<Vec<String>>("/realm/roles"), Some(vec!["admin".to_owned()]));
        assert_eq!(claims.get::<u8>("id"), Some(7));
        for (name, text) in [
            ("sub", Some("selam")),
            ("id", Some("7")),
            ("https://x/role", Some("editor")),
            ("/realm/roles/0", Some("admin")),
            ("rate", None),
            ("empty", None),
            ("verified", None),
            ("groups", None),
            ("realm", None),
            ("nothing", None),
            ("", None),
        ] {
            assert_eq!(claims.text(name).as_deref(), text, "{name}");
        }
        assert!(!format!("{claims:?}").contains("selam") && format!("{claims:?}").contains("sub"));
    }

    /// V1
    #[test]
    fn values_are_compared_exactly() {
        let claims = claims();
        for (name, value, has) in [
            ("sub", "selam", true),
            ("sub", "SELAM", false),
            ("sub", "sel", false),
            ("id", "7", true),
            ("verified", "true", true),
            ("verified", "false", false),
            ("groups", "gold", true),
            ("groups", "3", true),
            ("groups", "gol", false),
            ("/realm/roles", "admin", true),
            ("scope", "audio", true),
            ("scope", "chat audio", false),
            ("scope", "aud", false),
            ("realm", "roles", false),
            ("nothing", "", false),
        ] {
            assert_eq!(claims.has(name, value), has, "{name}={value}");
        }
    }
}
