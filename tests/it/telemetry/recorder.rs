//! A recorder that shows what it was told.

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
    asked: Arc<AtomicUsize>,
}

struct Series {
    recorder: Recorder,
    name: String,
}

impl Recorder {
    /// Every series and its value, `name{label=value,…}`.
    pub(super) fn all(&self) -> Vec<(String, f64)> {
        self.series.lock().unwrap().iter().map(|(name, value)| (name.clone(), *value)).collect()
    }

    pub(super) fn value(&self, series: &str) -> Option<f64> {
        self.series.lock().unwrap().get(series).copied()
    }

    /// How often anything was asked of it.
    pub(super) fn asked(&self) -> usize {
        self.asked.load(SeqCst)
    }

    pub(super) fn is_described(&self, name: &str) -> bool {
        self.described.lock().unwrap().contains(name)
    }

    fn series(&self, key: &Key) -> Arc<Series> {
        self.asked.fetch_add(1, SeqCst);
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
        unreachable!("there is none");
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.series(key))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.series(key))
    }

    fn register_histogram(&self, _: &Key, _: &Metadata<'_>) -> Histogram {
        unreachable!("there is none");
    }
}
