//! The snapshot of key and JWT that a request gets, in every interleaving.

use std::{
    sync::atomic::Ordering,
    task::{Context, Waker},
};

use loom::sync::atomic::AtomicUsize;

use super::*;
use crate::{
    refresh::loom_tests::{Numbered, Script, clock, engine, explore_within, prefetched},
    source::{Fetched, Reason, Source, SourceError},
    util::loom::{Tasks, spawn},
};

/// Three take more than a minute, and find the same outcomes.
const PREEMPTIONS: usize = 2;

/// Issues tokens with the current key: from number 0 with key 0, from number 4 with key 1.
struct Issuer {
    keys: Refreshing<ApiKey>,
    issued: AtomicUsize,
}

impl Source<Token> for Issuer {
    async fn fetch(&self, _: Reason<Token>) -> Result<Fetched<Token>, SourceError> {
        let fresh = self.keys.fresh().map(|lease| lease.credential.clone());
        let key = fresh.or_else(|| self.keys.current()).unwrap();
        let serial = self.issued.fetch_add(1, Ordering::AcqRel);
        Ok(Fetched::new(Token::numbered(4 * key.number() + serial)))
    }
}

/// Looks credentials up, and polls once if they have to be waited for.
fn lookup(provider: &CredentialProvider) -> Option<Sent> {
    loop {
        match provider.lookup(Scope::All, None).ok()? {
            Lookup::Ready(sent) => return Some(sent),
            Lookup::Wait(mut pending) => match pending.poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) | Poll::Pending => return None,
            },
        }
    }
}

/// Looks up a key and a JWT while both rotate, and returns their numbers.
///
/// A JWT may be issued with the current key. It is never sent with a key older than that one: an API that has revoked the key
/// could know neither. It may be sent with a newer key until it is refreshed, and either may be replaced before it is sent.
fn look_up_during_rotation(first: impl FnOnce(&Refreshing<Token>)) -> Option<(usize, usize)> {
    let clock = clock();
    let keys = prefetched::<ApiKey>(Script::new(&[0, 1]), &clock);
    let jwts = engine(Issuer { keys: keys.clone(), issued: AtomicUsize::new(0) }, &clock);
    first(&jwts);
    let provider = CredentialProvider::new(Some((&keys).into()), Some((&jwts).into()));
    let rotation = spawn(move || {
        Tasks::AtOnce.during(|| {
            let replace_jwt = || {
                jwts.current().iter().for_each(|jwt| {
                    // Otherwise the rejections of the next ones would be spaced.
                    jwts.accepted(jwt);
                    jwts.rejected(jwt);
                });
            };
            replace_jwt();
            keys.rejected(&ApiKey::numbered(0));
            replace_jwt();
            replace_jwt();
        });
    });
    let sent = Tasks::AtOnce.during(|| lookup(&provider));
    rotation.join().unwrap();
    sent.map(|sent| {
        let (key, jwt) = (sent.api_key.unwrap().credential.number(), sent.jwt.unwrap().credential.number());
        assert!(key >= jwt / 4, "token {jwt} with key {key}");
        (key, jwt)
    })
}

/// H5
#[test]
fn no_jwt_is_sent_with_a_key_older_than_its_own() {
    let outcomes = explore_within(PREEMPTIONS, || {
        look_up_during_rotation(|jwts| {
            assert!(Tasks::AtOnce.during(|| jwts.demand(&OnceCell::new())).is_ok())
        })
    });
    assert!(outcomes.is_superset(&[Some((0, 0)), Some((1, 1)), Some((1, 6))].into()), "{outcomes:?}");
}

/// H5
#[test]
fn nor_after_waiting_for_the_jwt() {
    let outcomes = explore_within(PREEMPTIONS, || look_up_during_rotation(|_| ()));
    assert!(outcomes.is_superset(&[Some((0, 0)), Some((1, 1)), Some((1, 4))].into()), "{outcomes:?}");
}
