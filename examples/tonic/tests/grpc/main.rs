//! `tower_selam::adapter::tonic` with tonic's own client, channel and server, over TLS on a loopback port.

mod errors;
mod redirects;
mod refusals;
mod support;
mod wire;
