//! The long pages: which layer goes where, hosts that are not Tower, how refreshing works, how replicas share tokens, and what can be monitored.

pub mod layers {
    #![doc = include_str!("layers.md")]
}

pub mod composition {
    #![doc = include_str!("composition.md")]
}

pub mod hosts {
    #![doc = include_str!("hosts.md")]
}

pub mod refreshing {
    #![doc = include_str!("refreshing.md")]
}

#[cfg(feature = "fleet")]
pub mod fleet {
    #![doc = include_str!("fleet.md")]
}

pub mod telemetry {
    #![doc = include_str!("telemetry.md")]
}
