//! Tests of `tower_selam::adapter::tonic` with tonic's client, channel and server over TLS on a loopback port.

mod errors;
mod redirects;
mod refusals;
mod subjects;
mod support;
mod wire;
