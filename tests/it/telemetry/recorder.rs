//! A metrics recorder that keeps every series in memory.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use metrics::{Counter, CounterFn, Gauge, GaugeFn, Histogram, Key, KeyName, Metadata, SharedString, Unit};

#[derive(Clone, Default)]
pub(super) struct Recorder {
    series: Arc<Mutex<BTreeMap<String, f64>>>,
    described: Arc<Mutex<BTreeSet<String>>>,
    registrations: Arc<AtomicUsize>,
}

struct Series {
    recorder: Recorder,
    name: String,
}

impl Recorder {
    /// Returns every series, as `name{label=value,…}`, and its value.
    pub(super) fn all(&self) -> Vec<(String, f64)> {
        self.series.lock().unwrap().iter().map(|(name, value)| (name.clone(), *value)).collect()
    }

    pub(super) fn value(&self, series: &str) -> Option<f64> {
        self.series.lock().unwrap().get(series).copied()
    }

    /// Counts how often a metric was looked up.
    pub(super) fn registrations(&self) -> usize {
        self.registrations.load(SeqCst)
    }

    pub(super) fn is_described(&self, name: &str) -> bool {
        self.described.lock().unwrap().contains(name)
    }

    fn register(&self, key: &Key) -> Arc<Series> {
        self.registrations.fetch_add(1, SeqCst);
        let mut labels: Vec<_> =
            key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        labels.sort();
        let name = format!("{}{{{}}}", key.name(), labels.join(","));
        self.series.lock().unwrap().entry(name.clone()).or_default();
        Arc::new(Series { recorder: self.clone(), name })
    }
}

impl Series {
    fn change(&self, change: impl FnOnce(&mut f64)) {
        change(self.recorder.series.lock().unwrap().entry(self.name.clone()).or_default());
    }
}

impl CounterFn for Series {
    fn increment(&self, by: u64) {
        self.change(|value| *value += by as f64);
    }

    fn absolute(&self, to: u64) {
        self.change(|value| *value = to as f64);
    }
}

impl GaugeFn for Series {
    fn increment(&self, by: f64) {
        self.change(|value| *value += by);
    }

    fn decrement(&self, by: f64) {
        self.change(|value| *value -= by);
    }

    fn set(&self, to: f64) {
        self.change(|value| *value = to);
    }
}

impl metrics::Recorder for Recorder {
    fn describe_counter(&self, name: KeyName, _: Option<Unit>, _: SharedString) {
        self.described.lock().unwrap().insert(name.as_str().to_owned());
    }

    fn describe_gauge(&self, name: KeyName, _: Option<Unit>, _: SharedString) {
        self.described.lock().unwrap().insert(name.as_str().to_owned());
    }

    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {
        unreachable!("the crate has no histograms");
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.register(key))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.register(key))
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        unreachable!("the crate has no histograms");
    }
}
