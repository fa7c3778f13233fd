//! Builds the layers under test and the credentials they take.

use std::time::Duration;

use tokio::runtime::Runtime;
use tower_selam::{
    ApiKey, ApiKeyLayer, BoxError, JwtLayer, JwtProvider, Provider, Refreshing, SelamLayer, Token,
    fleet::{Fleet, MemoryStore, SealingKey},
    source::{Fetched, Reason, source_fn},
};

use crate::requests::{JWT, KEY};

pub const HOUR: Duration = Duration::from_secs(60 * 60);

pub fn fixed_key() -> ApiKey {
    ApiKey::new(KEY).expect("the key is valid")
}

pub fn fixed_jwt() -> Token {
    Token::new(JWT).expect("the JWT is valid")
}

/// A refreshing key that was just fetched.
pub fn refreshing_key(runtime: &Runtime) -> Refreshing<ApiKey> {
    let keys = Refreshing::new(source_fn(|_: Reason<ApiKey>| async {
        Ok::<_, BoxError>(Fetched::new(fixed_key()).with_recheck_after(HOUR))
    }));
    runtime.block_on(keys.prefetch()).expect("the key is fetched");
    keys
}

/// A refreshing JWT that was just fetched and is valid for an hour.
pub fn refreshing_jwt(runtime: &Runtime) -> Refreshing<Token> {
    let jwts = Refreshing::new(source_fn(|_: Reason<Token>| async {
        Ok::<_, BoxError>(Fetched::new(fixed_jwt()).with_lifetime(HOUR))
    }));
    runtime.block_on(jwts.prefetch()).expect("the JWT is fetched");
    jwts
}

/// As [`refreshing_jwt`], shared in a fleet.
pub fn fleet_jwt(runtime: &Runtime) -> Refreshing<Token> {
    let fleet =
        Fleet::new("bench", MemoryStore::default(), SealingKey::new([1; 32])).expect("the name is valid");
    let source = source_fn(|_: Reason<Token>| async {
        Ok::<_, BoxError>(Fetched::new(fixed_jwt()).with_lifetime(HOUR))
    });
    let jwts = Refreshing::new(fleet.share("selam", source));
    runtime.block_on(jwts.prefetch()).expect("the JWT is fetched");
    jwts
}

/// Writes the key to `Authorization`.
pub fn key_layer(key: impl Into<Provider<ApiKey>>) -> ApiKeyLayer {
    ApiKeyLayer::bearer(key)
}

/// Writes the JWT to `Authorization` and the key to `X-API-Key`, with one layer each.
pub fn jwt_and_key_layers(
    jwt: impl Into<JwtProvider>,
    key: impl Into<Provider<ApiKey>>,
) -> (JwtLayer, ApiKeyLayer) {
    (JwtLayer::new(jwt), ApiKeyLayer::x_api_key(key))
}

/// The whole stack with the key alone.
pub fn selam_with_key(key: impl Into<Provider<ApiKey>>) -> SelamLayer {
    SelamLayer::builder().with_api_key(key).build().expect("the layer is valid")
}

/// The whole stack with JWT and key.
pub fn selam_with_jwt(jwt: impl Into<JwtProvider>, key: impl Into<Provider<ApiKey>>) -> SelamLayer {
    SelamLayer::builder().with_api_key(key).with_jwt(jwt).build().expect("the layer is valid")
}
