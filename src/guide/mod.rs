//! The long pages: which layer goes where, how refreshing works, and what can be monitored.

pub mod layers {
    #![doc = include_str!("layers.md")]
}

pub mod composition {
    #![doc = include_str!("composition.md")]
}

pub mod refreshing {
    #![doc = include_str!("refreshing.md")]
}

pub mod telemetry {
    #![doc = include_str!("telemetry.md")]
}
