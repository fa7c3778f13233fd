//! What a layer has to send: one consistent set of credentials at a time, of a key and a JWT that may each renew
//! themselves.
//!
//! The set is made when one of the two changes and then shared by all requests, which read it without a lock.

use std::{
    fmt,
    future::pending,
    pin::Pin,
    sync::{Arc, Weak},
};

use arc_swap::ArcSwapOption;

use crate::{
    ApiKey, AuthError, Credentials, MaybeRenewing, Token,
    clock::Deadline,
    credentials::Form,
    engine::{Demand, Epoch, Landing, Rejection},
    secret::Credential,
};

/// Makes [`Credentials`] of a key and a JWT.
pub(crate) struct Supply {
    form: Form,
    /// The key goes as `X-API-Key` when it goes alone.
    as_header: bool,
    key: Option<MaybeRenewing<ApiKey>>,
    jwt: Option<MaybeRenewing<Token>>,
    whole: Shelf,
    key_alone: Shelf,
    this: Weak<Self>,
}

/// What a request needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    All,
    KeyAlone,
}

type Shelf = ArcSwapOption<Made>;

/// A set and what it was made of.
struct Made {
    credentials: Credentials,
    epochs: [Epoch; 2],
    until: Option<Deadline>,
}

pub(crate) type Waiting = Pin<Box<dyn Future<Output = Result<Credentials, AuthError>> + Send + Sync>>;

/// A set, or what to wait for.
pub(crate) enum Supplied {
    Ready(Credentials),
    Wait(Waiting),
}

impl Supply {
    pub(crate) fn new(
        form: Form,
        as_header: bool,
        key: Option<MaybeRenewing<ApiKey>>,
        jwt: Option<MaybeRenewing<Token>>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            form,
            as_header,
            key,
            jwt,
            whole: Shelf::empty(),
            key_alone: Shelf::empty(),
            this: this.clone(),
        })
    }

    /// The set, if nothing has to be asked about it.
    #[inline]
    pub(crate) fn fresh(&self, need: Need) -> Option<Credentials> {
        let made = self.shelf(need).load();
        let made = made.as_deref()?;
        let fresh = made.epochs == self.epochs(need) && made.until.is_none_or(|until| !self.has_come(until));
        fresh.then(|| made.credentials.clone())
    }

    /// The last set that was made, fresh or not.
    pub(crate) fn last(&self) -> Option<Credentials> {
        self.whole.load().as_deref().map(|made| made.credentials.clone())
    }

    /// The set, or what to wait for; starts renewals if need be.
    pub(crate) fn demand(&self, need: Need) -> Result<Supplied, AuthError> {
        Ok(match (self.ask(need)?, self.this.upgrade()) {
            (Some(credentials), _) => Supplied::Ready(credentials),
            (None, Some(this)) => Supplied::Wait(Box::pin(this.obtain(need))),
            (None, None) => Supplied::Wait(Box::pin(pending())),
        })
    }

    /// The set, unless there is something to wait for.
    fn ask(&self, need: Need) -> Result<Option<Credentials>, AuthError> {
        if need == Need::KeyAlone && self.key.is_none() {
            return Ok(Some(Credentials::beside()));
        }
        loop {
            let key = demand(self.key.as_ref())?;
            let jwt = demand(self.jwt(need))?;
            let (Demand::Ready(key), Demand::Ready(jwt)) = (key, jwt) else { return Ok(None) };

            // First the epochs: what changes after them makes the set outdated, not wrong.
            let epochs = self.epochs(need);
            let leases = (lease(self.key.as_ref()), lease(self.jwt(need)));
            let (key, jwt, until) = match leases {
                (Some((key, key_until)), Some((jwt, jwt_until))) => {
                    let until = match (key_until, jwt_until) {
                        (Some(key), Some(jwt)) => Some(key.earlier(jwt)),
                        (key, jwt) => key.or(jwt),
                    };
                    (key, jwt, Some(until))
                }
                _ => (key, jwt, None),
            };
            // The JWT was read after the key: where that is another by now, the two may never have been a pair.
            if !self.is_current(key.as_ref()) {
                continue;
            }
            let credentials = self.make(need, key, jwt);
            if let Some(until) = until {
                let made = Made { credentials: credentials.clone(), epochs, until };
                self.shelf(need).store(Some(Arc::new(made)));
            }
            return Ok(Some(credentials));
        }
    }

    /// The set, after what there is to wait for.
    async fn obtain(self: Arc<Self>, need: Need) -> Result<Credentials, AuthError> {
        loop {
            if let Some(key) = &self.key {
                key.get().await?;
            }
            if let Some(jwt) = self.jwt(need) {
                jwt.get().await?;
            }
            // The one may have been refused while the other was awaited.
            if let Some(credentials) = self.ask(need)? {
                return Ok(credentials);
            }
        }
    }

    fn is_current(&self, key: Option<&ApiKey>) -> bool {
        let current = self.key.as_ref().and_then(MaybeRenewing::current);
        let fingerprint = |key: &ApiKey| key.0.fingerprint();
        current.as_ref().map(fingerprint) == key.map(fingerprint)
    }

    fn make(&self, need: Need, key: Option<ApiKey>, jwt: Option<Token>) -> Credentials {
        let made = match (self.form, key, jwt) {
            (Form::Pair, Some(key), Some(jwt)) => Credentials::key_and_jwt(key, jwt),
            (Form::KeyHalf, Some(key), _) if need == Need::All => Credentials::key_beside_jwt(key),
            (Form::Key, Some(key), _) if self.as_header => Credentials::header(key),
            (_, Some(key), _) => Credentials::bearer(key),
            (_, None, Some(jwt)) => Credentials::jwt_beside_key(jwt),
            (_, None, None) => Credentials::beside(),
        };
        made.supplied_by(self.this.clone())
    }

    /// The API refused `sent`; whether its `part` can be another by now, and what to wait for until then.
    pub(crate) fn reject(&self, part: Part, sent: &Credentials) -> (Rejection, Option<Landing>) {
        let ignored = (Rejection::Ignored, None);
        match part {
            Part::Key => match (&self.key, sent.api_key()) {
                (Some(key), Some(sent)) => key.reject(sent.0.fingerprint()),
                _ => ignored,
            },
            Part::Jwt => match (&self.jwt, sent.jwt()) {
                (Some(jwt), Some(sent)) => jwt.reject(sent.secret.fingerprint()),
                _ => ignored,
            },
        }
    }

    /// Whether `part` is there and is not what was sent.
    pub(crate) fn has_other(&self, part: Part, sent: &Credentials) -> bool {
        match part {
            Part::Key => self.key.as_ref().and_then(MaybeRenewing::current).is_some_and(|key| {
                Some(key.0.fingerprint()) != sent.api_key().map(|sent| sent.0.fingerprint())
            }),
            Part::Jwt => self.jwt.as_ref().and_then(MaybeRenewing::current).is_some_and(|jwt| {
                Some(jwt.secret.fingerprint()) != sent.jwt().map(|sent| sent.secret.fingerprint())
            }),
        }
    }

    pub(crate) fn form(&self) -> Form {
        self.form
    }

    /// The set, if none of it is ever another.
    pub(crate) fn fixed(&self) -> Option<Credentials> {
        let (key, jwt) = (fixed(self.key.as_ref())?, fixed(self.jwt.as_ref())?);
        Some(self.make(Need::All, key, jwt))
    }

    fn jwt(&self, need: Need) -> Option<&MaybeRenewing<Token>> {
        self.jwt.as_ref().filter(|_| need == Need::All)
    }

    #[inline]
    fn epochs(&self, need: Need) -> [Epoch; 2] {
        let epoch = |jwt: &MaybeRenewing<Token>| jwt.epoch();
        let key = self.key.as_ref().map(MaybeRenewing::epoch).unwrap_or_default();
        [key, self.jwt(need).map(epoch).unwrap_or_default()]
    }

    #[inline]
    fn has_come(&self, until: Deadline) -> bool {
        let now = self.jwt.as_ref().and_then(MaybeRenewing::now);
        let now = now.or_else(|| self.key.as_ref().and_then(MaybeRenewing::now));
        now.is_none_or(|now| until.has_come(now))
    }

    #[inline]
    fn shelf(&self, need: Need) -> &Shelf {
        match need {
            Need::All => &self.whole,
            Need::KeyAlone => &self.key_alone,
        }
    }
}

/// The part of a set that an API may refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    Key,
    Jwt,
}

/// What is not wanted is there: nothing.
fn demand<C: Credential>(part: Option<&MaybeRenewing<C>>) -> Result<Demand<Option<C>>, AuthError> {
    Ok(match part.map(MaybeRenewing::demand).transpose()? {
        None => Demand::Ready(None),
        Some(Demand::Ready(credential)) => Demand::Ready(Some(credential)),
        Some(Demand::Wait(landed)) => Demand::Wait(landed),
    })
}

fn fixed<C: Credential>(part: Option<&MaybeRenewing<C>>) -> Option<Option<C>> {
    match part {
        None => Some(None),
        Some(MaybeRenewing::Fixed(credential)) => Some(Some(credential.clone())),
        Some(MaybeRenewing::Renewing(_)) => None,
    }
}

fn lease<C: Credential>(part: Option<&MaybeRenewing<C>>) -> Option<(Option<C>, Option<Deadline>)> {
    match part {
        None => Some((None, None)),
        Some(part) => part.lease().map(|(credential, until)| (Some(credential), until)),
    }
}

impl fmt::Debug for Supply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Supply").field("key", &self.key).field("jwt", &self.jwt).finish_non_exhaustive()
    }
}
