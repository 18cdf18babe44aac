-- Failed leases that are settled and were seen to have no account: they are forgotten soon.
CREATE INDEX leases_failed ON leases (created) WHERE state = 'failed' AND next_reconcile IS NULL;
