//! Methods that every service of this crate has.

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
