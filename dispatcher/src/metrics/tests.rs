//! Tests of the content of a scrape.

use super::*;
use mayfly_common::broker::Waiting;

#[test]
fn a_quiet_pool_reports_zeros() {
    let metrics = Metrics::new().unwrap();
    let pool: PoolName = "pool1".parse().unwrap();
    let count = PoolCount {
        pool,
        leases: [0; 5],
        settling: 0,
        stuck: 0,
        overdue: 0,
    };
    metrics.pools(Some(&[count]), |_| 0);
    let text = metrics.text();
    for line in [
        "mayfly_dispatcher_leases{pool=\"pool1\",state=\"revoking\"} 0",
        "mayfly_dispatcher_leases_overdue{pool=\"pool1\"} 0",
        "mayfly_dispatcher_leases_settling{pool=\"pool1\"} 0",
        "mayfly_dispatcher_engines{pool=\"pool1\"} 0",
        "mayfly_dispatcher_issues_total{outcome=\"ok\",pool=\"pool1\"} 0",
        "mayfly_dispatcher_delays_overridden 0",
        "mayfly_dispatcher_delay_levels_absent_total 0",
        "mayfly_dispatcher_unroutable_total 0",
        "mayfly_dispatcher_unroutable_live_total 0",
        "mayfly_dispatcher_errors_total{code=\"no_engine\",pool=\"pool1\"} 0",
        "mayfly_dispatcher_store_up 0",
        "mayfly_dispatcher_store_failures_total{cause=\"full\"} 0",
        "mayfly_dispatcher_broker_up 0",
        "mayfly_dispatcher_reconciler 0",
        "mayfly_dispatcher_messages_refused_total{reason=\"other_key\"} 0",
        "mayfly_dispatcher_renewals_total{outcome=\"refused\",pool=\"pool1\"} 0",
        "mayfly_dispatcher_sweeps_total{outcome=\"failed\",pool=\"pool1\"} 0",
        "mayfly_dispatcher_swept_accounts_total{pool=\"pool1\"} 0",
        "mayfly_dispatcher_broker_reconnects_total 0",
        "mayfly_dispatcher_store_commit_duration_seconds_count 0",
        "mayfly_dispatcher_http_refused_total{reason=\"unauthenticated\"} 0",
        "mayfly_dispatcher_http_refused_total{reason=\"body_too_large\"} 0",
        "mayfly_dispatcher_http_refused_total{reason=\"no_room\"} 0",
    ] {
        assert!(text.contains(line), "{line} in\n{text}");
    }
    metrics.pools(None, |_| 0);
    let text = metrics.text();
    assert!(!text.contains("mayfly_dispatcher_leases{"));
    assert!(!text.contains("mayfly_dispatcher_engines{"));
}

#[test]
fn a_queue_that_cannot_be_counted_is_not_shown_as_it_was() {
    let metrics = Metrics::new().unwrap();
    let waiting = Waiting {
        create: 0,
        revoke: 7,
    };
    metrics.waiting(&[("pool1".parse().unwrap(), waiting)]);
    let line = "mayfly_dispatcher_queue_messages{pool=\"pool1\",queue=\"revoke\"} 7";
    assert!(metrics.text().contains(line));
    metrics.waiting(&[]);
    assert!(!metrics.text().contains("mayfly_dispatcher_queue_messages{"));
}

#[test]
fn errors_are_counted_by_their_code() {
    let metrics = Metrics::new().unwrap();
    let pool = "pool1".parse().unwrap();
    metrics.issued(&pool, Some(Code::NoEngine), Duration::ZERO);
    metrics.issued(&pool, Some(Code::Quota), Duration::ZERO);
    let text = metrics.text();
    for line in [
        "mayfly_dispatcher_errors_total{code=\"no_engine\",pool=\"pool1\"} 1",
        "mayfly_dispatcher_errors_total{code=\"quota\",pool=\"pool1\"} 1",
        "mayfly_dispatcher_issues_total{outcome=\"failed\",pool=\"pool1\"} 1",
        "mayfly_dispatcher_issues_total{outcome=\"refused\",pool=\"pool1\"} 1",
    ] {
        assert!(text.contains(line), "{line} in\n{text}");
    }
}

#[test]
fn what_a_dispatcher_does_is_counted_by_how_it_ended() {
    let metrics = Metrics::new().unwrap();
    let pool = "pool1".parse().unwrap();
    metrics.renewed(&pool, None);
    metrics.renewed(&pool, Some(Code::Invalid));
    metrics.renewed(&pool, Some(Code::Deadline));
    metrics.swept(&pool, Some(3));
    metrics.swept(&pool, None);
    metrics.commits()(Duration::from_millis(2));
    metrics.reconnects(2);
    metrics.reconnects(2);
    let text = metrics.text();
    for line in [
        "mayfly_dispatcher_renewals_total{outcome=\"ok\",pool=\"pool1\"} 1",
        "mayfly_dispatcher_renewals_total{outcome=\"refused\",pool=\"pool1\"} 1",
        "mayfly_dispatcher_renewals_total{outcome=\"failed\",pool=\"pool1\"} 1",
        "mayfly_dispatcher_sweeps_total{outcome=\"ok\",pool=\"pool1\"} 1",
        "mayfly_dispatcher_sweeps_total{outcome=\"failed\",pool=\"pool1\"} 1",
        "mayfly_dispatcher_swept_accounts_total{pool=\"pool1\"} 3",
        "mayfly_dispatcher_store_commit_duration_seconds_bucket{le=\"0.0025\"} 1",
        "mayfly_dispatcher_store_commit_duration_seconds_bucket{le=\"0.001\"} 0",
        "mayfly_dispatcher_broker_reconnects_total 2",
    ] {
        assert!(text.contains(line), "{line} in\n{text}");
    }
}

/// A caller chooses paths, methods and headers: none of it may make a series of its own.
#[test]
fn no_label_of_a_request_is_the_callers() {
    let metrics = Metrics::new().unwrap();
    metrics
        .request(Some("/v1/secrets/{*path}"), "GET")
        .answered(200, None);
    metrics
        .request(None, "PROPFIND")
        .answered(404, Some("not_found"));
    drop(metrics.request(Some("/v1/secrets/{*path}"), "GET"));
    let text = metrics.text();
    for line in [
        "http_requests_total{method=\"GET\",route=\"/v1/secrets/{*path}\",status=\"200\"} 1",
        "http_requests_total{method=\"GET\",route=\"/v1/secrets/{*path}\",status=\"499\"} 1",
        "http_requests_total{method=\"other\",route=\"none\",status=\"404\"} 1",
        "http_request_duration_seconds_count{route=\"/v1/secrets/{*path}\"} 2",
        "http_refused_total{reason=\"not_found\"} 1",
    ] {
        assert!(text.contains(line), "{line} in\n{text}");
    }
}
