#!/usr/bin/env python3
"""Tests of the chart, with real tools: check.py TOOLS, where TOOLS is what tools.sh prints.
CHECK=word: only the checks whose name contains it."""

import os
import sys
from concurrent.futures import ProcessPoolExecutor

sys.dont_write_bytecode = True

from checks import documented, encryption, kinds, packaging, places, settings, sight, store, tools, upgrades

CHECKS = [
    packaging.lints_packages_and_installs,
    packaging.notes_tell_the_next_command,
    packaging.metadata_is_whole,
    packaging.the_package_stands_alone,
    packaging.installs_from_a_registry,
    kinds.objects_are_valid,
    kinds.names_are_legal,
    kinds.long_names_differ,
    settings.wrong_values_are_refused,
    settings.usual_values_are_taken,
    settings.no_part_is_rabbitmqs_administrator,
    settings.the_schema_needs_every_value,
    settings.nulls_are_named,
    settings.a_groups_values_win,
    settings.every_value_is_used,
    kinds.pods_are_restricted,
    kinds.networks_are_closed,
    kinds.helm_test_reaches_the_api,
    encryption.plaintext_is_asked_for_by_name,
    encryption.certificates_reach_their_programs,
    encryption.prometheus_knows_the_certificates,
    encryption.rabbitmqs_authority_is_rabbitmqs_alone,
    places.openshift_chooses_the_users,
    places.ipv6_is_served,
    places.images_are_chosen_for_each_program,
    places.own_variables_replace_the_charts,
    places.pods_take_what_is_added,
    places.accounts_are_named_once,
    places.other_objects_are_made,
    upgrades.scalers_leave_an_engine_and_its_tasks,
    upgrades.scalers_change_hands,
    upgrades.a_scaler_has_something_to_count,
    upgrades.pods_are_replaced_when_their_secrets_change,
    upgrades.names_of_before_are_kept,
    upgrades.selectors_are_those_of_before,
    upgrades.drains_and_upgrades_go_on,
    store.copies_are_made_beside_the_dispatcher,
    store.the_store_is_handled_while_no_dispatcher_runs,
    sight.rules_are_good,
    sight.rules_are_of_one_namespace,
    sight.dashboards_are_good,
    sight.figures_have_their_colours,
    documented.documented_pods_are_valid,
    packaging.readme_is_of_now,
]


def main():
    word = os.environ.get("CHECK", "")
    chosen = [check for check in CHECKS if word in check.__name__]
    assert chosen, f"no check is called {word}"
    # A process for each core, each with a simulated cluster of its own: checks change the Secrets in it.
    with ProcessPoolExecutor(os.cpu_count(), initializer=tools.with_cluster) as workers:
        running = [(check.__name__.replace("_", " "), workers.submit(check)) for check in chosen]
        for name, result in running:
            try:
                told = result.result()
            except BaseException:
                workers.shutdown(wait=False, cancel_futures=True)
                print(f"chart: {name}: FAILED", flush=True)
                raise
            print(f"chart: {name}: ok{f' ({told})' if told else ''}", flush=True)


main()
