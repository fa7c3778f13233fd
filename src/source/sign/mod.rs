//! JWTs signed by the program itself: [`JwtSigner`].

mod algorithm;
mod key;
mod signer;

pub use self::{
    algorithm::SigningAlgorithm,
    key::{HmacSecret, SigningKey},
    signer::JwtSigner,
};
