//! Methods that several services of this crate have, `Debug` for opaque types, and lists of conversions.

/// Access to the inner service, in the field `inner`.
macro_rules! inner_accessors {
    () => {
        /// Returns a reference to the inner service.
        pub fn get_ref(&self) -> &S {
            &self.inner
        }

        /// Returns a mutable reference to the inner service.
        pub fn get_mut(&mut self) -> &mut S {
            &mut self.inner
        }

        /// Returns the inner service and discards this one.
        pub fn into_inner(self) -> S {
            self.inner
        }
    };
}

/// Adds an extension to the requests of a client, in the field `extensions`.
macro_rules! with_extension {
    () => {
        /// Adds this extension to every request that has none of its type: a [`RequestAuth`](crate::RequestAuth), a
        /// [`Subject`](crate::Subject), or any other that a layer reads. It replaces an earlier one of its type.
        #[must_use]
        pub fn with_extension<T: Clone + Send + Sync + 'static>(mut self, extension: T) -> Self {
            self.extensions.insert(extension);
            self
        }
    };
}

/// Implements `Debug` to show the type's name alone, for types whose fields are opaque or may hold secrets.
macro_rules! opaque_debug {
    ($type:ident $(<$($parameter:tt),+>)? $(where $($bounds:tt)+)?) => {
        impl $(<$($parameter),+>)? std::fmt::Debug for $type $(<$($parameter),+>)? $(where $($bounds)+)? {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($type)).finish_non_exhaustive()
            }
        }
    };
}

/// Implements `From` for a list of types.
macro_rules! impl_from {
    ($($target:ty: [$($parameter:tt)*] $source:ty, $value:ident => $made:expr;)*) => {$(
        impl<$($parameter)*> From<$source> for $target {
            fn from($value: $source) -> Self {
                $made
            }
        }
    )*};
}
