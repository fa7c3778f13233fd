//! What there seldom is.

use std::mem::ManuallyDrop;

/// A value, until it is taken, that is dropped out of line: in the drop of an enum with such a variant, the usual ones stay
/// as cheap as without it.
pub(crate) struct Cold<T>(ManuallyDrop<Option<T>>);

impl<T> Cold<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(ManuallyDrop::new(Some(value)))
    }

    pub(crate) fn as_ref(&self) -> Option<&T> {
        self.0.as_ref()
    }

    pub(crate) fn as_mut(&mut self) -> Option<&mut T> {
        self.0.as_mut()
    }

    pub(crate) fn take(&mut self) -> Option<T> {
        self.0.take()
    }
}

/// As one that is taken.
impl<T> Default for Cold<T> {
    fn default() -> Self {
        Self(ManuallyDrop::new(None))
    }
}

impl<T> Drop for Cold<T> {
    // All there is to drop, as nothing else drops what `ManuallyDrop` holds.
    #[cold]
    #[inline(never)]
    fn drop(&mut self) {
        drop(self.take());
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    #[test]
    fn what_it_holds_is_dropped_with_it_or_taken() {
        let value = Rc::new(());
        drop(Cold::new(Rc::clone(&value)));
        assert_eq!(Rc::strong_count(&value), 1);

        let mut cold = Cold::new(Rc::clone(&value));
        let taken = cold.take();
        assert!(cold.as_ref().is_none() && cold.as_mut().is_none() && cold.take().is_none());
        drop(cold);
        assert_eq!(Rc::strong_count(&value), 2);
        drop(taken);
        assert_eq!(Rc::strong_count(&value), 1);
    }
}
