//! A small multiset: messages that may arrive in any order.

use std::fmt;

/// At most `N` of `T`, sorted, so that equal bags are equal values.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bag<T, const N: usize> {
    items: [Option<T>; N],
}

impl<T: Copy + Ord, const N: usize> Default for Bag<T, N> {
    fn default() -> Self {
        Self { items: [None; N] }
    }
}

impl<T: Copy + Ord, const N: usize> Bag<T, N> {
    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = T> + '_ {
        self.items.iter().flatten().copied()
    }

    /// Each distinct element once.
    pub fn distinct(&self) -> impl Iterator<Item = T> + '_ {
        let mut last = None;
        self.iter()
            .filter(move |item| last.replace(*item) != Some(*item))
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.items.iter().flatten().count()
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.items.iter().all(Option::is_none)
    }

    /// Adds one. Returns whether there was room.
    #[must_use]
    pub fn add(&mut self, item: T) -> bool {
        let Some(free) = self.items.iter().position(Option::is_none) else {
            return false;
        };
        self.items[free] = Some(item);
        self.sort();
        true
    }

    /// Removes one.
    pub fn remove(&mut self, item: T) {
        if let Some(place) = self.items.iter().position(|other| *other == Some(item)) {
            self.items[place] = None;
            self.sort();
        }
    }

    /// Number of elements equal to `item`.
    pub fn count(&self, item: T) -> usize {
        self.iter().filter(|other| *other == item).count()
    }

    /// The bag of the results of a function for each element.
    #[must_use]
    pub fn map(mut self, change: impl Fn(T) -> T) -> Self {
        for item in self.items.iter_mut().flatten() {
            *item = change(*item);
        }
        self.sort();
        self
    }

    /// Without second copies, and without unwanted elements.
    #[must_use]
    pub fn once(self, wanted: impl Fn(T) -> bool) -> Self {
        let mut kept = Self::default();
        for (place, item) in self.distinct().filter(|item| wanted(*item)).enumerate() {
            kept.items[place] = Some(item);
        }
        kept
    }

    fn sort(&mut self) {
        self.items
            .sort_unstable_by_key(|item| (item.is_none(), *item));
    }
}

impl<T: Copy + Ord + fmt::Debug, const N: usize> fmt::Debug for Bag<T, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
