//! What every service of this crate has.

/// Access to the service within, in the field `inner`.
macro_rules! inner_accessors {
    () => {
        /// The service within.
        pub fn get_ref(&self) -> &S {
            &self.inner
        }

        /// The service within, to be changed.
        pub fn get_mut(&mut self) -> &mut S {
            &mut self.inner
        }

        /// The service within, without this one.
        pub fn into_inner(self) -> S {
            self.inner
        }
    };
}
