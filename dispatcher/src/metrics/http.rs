//! Numbers of the HTTP API. No label holds text of a caller: a route is its template, a method and a reason are words
//! of a list.

use std::time::Instant;

use mayfly_common::serve::Refusal;
use prometheus::{HistogramVec, IntCounterVec};

use super::{BUCKETS, Declare, Metrics};
use crate::error::{Code, Limit};

/// The status of a request whose caller left before the answer, as nginx logs it.
const CALLER_LEFT: &str = "499";

#[derive(Clone)]
pub(super) struct Http {
    requests: IntCounterVec,
    duration: HistogramVec,
    refused: IntCounterVec,
}

impl Http {
    pub(super) fn new(declare: &Declare) -> Result<Self, prometheus::Error> {
        let requests = declare.counters(
            "mayfly_dispatcher_http_requests_total",
            "Requests of the HTTP API, by route, method and status. Status 499: the caller left before the answer.",
            &["route", "method", "status"],
        )?;
        let duration = declare.histograms(
            "mayfly_dispatcher_http_request_duration_seconds",
            "Time from the head of a request to its answer, in seconds.",
            &BUCKETS,
            &["route"],
        )?;
        let refused = declare.counters(
            "mayfly_dispatcher_http_refused_total",
            "Requests answered with 4xx, and connections that were refused or closed before a request was complete. reason: the code in the answer, or a more exact reason.",
            &["reason"],
        )?;
        let codes = Code::ALL.into_iter().filter(|code| code.is_refusal());
        let limits = Limit::ALL.map(Limit::as_str);
        for reason in codes
            .map(Code::as_str)
            .chain(limits)
            .chain(Refusal::ALL.map(Refusal::as_str))
        {
            refused.with_label_values(&[reason]);
        }
        Ok(Self {
            requests,
            duration,
            refused,
        })
    }
}

/// A request in progress. If it is dropped without an answer, its caller has left.
pub(crate) struct Request<'a> {
    metrics: &'a Metrics,
    route: String,
    method: &'static str,
    begun: Instant,
    answered: bool,
}

impl Request<'_> {
    /// The request was answered. `refused` is the reason if it was refused.
    pub(crate) fn answered(mut self, status: u16, refused: Option<&'static str>) {
        self.answered = true;
        self.count(&status.to_string());
        if let Some(reason) = refused {
            self.metrics.http_refused(reason);
        }
    }

    fn count(&self, status: &str) {
        let http = &self.metrics.http;
        http.requests
            .with_label_values(&[&self.route, self.method, status])
            .inc();
        http.duration
            .with_label_values(&[&self.route])
            .observe(self.begun.elapsed().as_secs_f64());
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if !self.answered {
            self.count(CALLER_LEFT);
        }
    }
}

impl Metrics {
    /// A request has arrived. `route` is the template of its route; `None`: there is no such route.
    pub(crate) fn request(&self, route: Option<&str>, method: &str) -> Request<'_> {
        Request {
            metrics: self,
            route: route.unwrap_or("none").to_owned(),
            method: match method {
                "GET" => "GET",
                "HEAD" => "HEAD",
                "POST" => "POST",
                "PUT" => "PUT",
                "DELETE" => "DELETE",
                _ => "other",
            },
            begun: Instant::now(),
            answered: false,
        }
    }

    /// A request or a connection was refused.
    pub(crate) fn http_refused(&self, reason: &'static str) {
        self.http.refused.with_label_values(&[reason]).inc();
    }
}
