//! A box for what there seldom is.

use std::mem::ManuallyDrop;

/// A box, until it is taken, that is dropped out of line: in the drop of an enum with such a variant, the usual ones stay
/// as cheap as without it.
pub(crate) struct ColdBox<T>(ManuallyDrop<Option<Box<T>>>);

impl<T> ColdBox<T> {
    pub(crate) fn new(value: T) -> Self {
        Box::new(value).into()
    }

    pub(crate) fn as_ref(&self) -> Option<&T> {
        self.0.as_deref()
    }

    pub(crate) fn as_mut(&mut self) -> Option<&mut T> {
        self.0.as_deref_mut()
    }

    pub(crate) fn take(&mut self) -> Option<Box<T>> {
        self.0.take()
    }
}

impl<T> From<Box<T>> for ColdBox<T> {
    fn from(value: Box<T>) -> Self {
        Self(ManuallyDrop::new(Some(value)))
    }
}

impl<T> Drop for ColdBox<T> {
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
        drop(ColdBox::new(Rc::clone(&value)));
        assert_eq!(Rc::strong_count(&value), 1);

        let mut cold = ColdBox::new(Rc::clone(&value));
        let taken = cold.take();
        assert!(cold.as_ref().is_none() && cold.as_mut().is_none() && cold.take().is_none());
        drop(cold);
        assert_eq!(Rc::strong_count(&value), 2);
        drop(taken);
        assert_eq!(Rc::strong_count(&value), 1);
    }
}
