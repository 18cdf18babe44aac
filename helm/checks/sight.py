"""Rules and dashboards."""

import copy
import json
import os
import re
from glob import glob

import yaml

from checks.tools import CHART, ROOT, TOOLS, VALUES, must, named, objects, rendered, run, template, written


def rules_are_good():
    promtool = os.path.join(os.path.dirname(TOOLS), "prometheus", "promtool")
    rules = f"{CHART}/files/rules.yml"
    must(run(promtool, "check", "rules", "--lint=all", "--lint-fatal", rules), "promtool check rules")
    must(run(promtool, "test", "rules", f"{CHART}/files/rules_test.yml"), "promtool test rules")
    groups = yaml.safe_load(open(rules))["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    tested = open(f"{CHART}/files/rules_test.yml").read()
    runbook = open(f"{ROOT}/docs/runbook.md").read()
    sources = "".join(open(file).read() for file in glob(f"{ROOT}/*/src/**/*.rs", recursive=True))
    for reason in re.findall(r'reason="(\w+)"', tested):
        assert f'"{reason}"' in sources, f"no program gives the reason {reason}"
    for alert in alerts:
        name = alert["alert"]
        assert re.search(rf"alertname: {name}\n\s+exp_alerts:\n\s+- exp_labels", tested), f"{name}: no case in which it fires"
        assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}", name
        assert f"\n## {name}\n" in runbook, f"{name}: no section in docs/runbook.md"
    for record in [rule["record"] for group in groups for rule in group["rules"] if "record" in rule]:
        assert f"expr: {record}" in tested or f"({record}" in tested, f"{record}: no test"
        others = [rule["expr"] for group in groups for rule in group["rules"] if rule.get("record") != record]
        assert any(record in expression for expression in others), f"{record}: nothing uses it"

    def shipped(name):
        rendered = objects(template(f"{CHART}/ci/{name}-values.yaml", "--set", "metrics.rules.enabled=true"))
        (rules,) = [one["spec"]["groups"] for one in rendered if one["kind"] == "PrometheusRule"]
        return rules

    wanted = copy.deepcopy(groups)
    for rule in [rule for group in wanted for rule in group["rules"]]:
        rule["expr"] = re.sub(r"(mayfly[_:][\w:]+)(\{)?", lambda found: found[1] + '{namespace="apps"' + ("," if found[2] else "}"), rule["expr"])
        if "alert" in rule:
            rule["annotations"]["runbook_url"] = rule["annotations"]["runbook_url"].replace("docs/runbook.md", "https://wiki.example.com/mayfly/runbook")
    assert shipped("full") == wanted, "the chart ships other rules"
    names = [[rule.get("alert") for group in shipped(name) for rule in group["rules"]] for name in ("single", "engines-only")]
    assert [name for name in names[0] if name not in names[1]] == ["MayflyNoDispatcher"], names
    return f"{len(alerts)} alerts"


def rules_are_of_one_namespace():
    """With two releases and one Prometheus, each release's rules see only its own namespace. So an alert fires once,
    and a running dispatcher in one namespace does not hide an absent one in the other."""
    promtool = os.path.join(os.path.dirname(TOOLS), "prometheus", "promtool")
    both = {}
    for namespace in ("apps", "other"):
        made = objects(template(f"{CHART}/ci/single-values.yaml", "--set", "metrics.rules.enabled=true", "--namespace", namespace))
        both[namespace] = named(made, "PrometheusRule")["spec"]["groups"]
        for rule in [rule for group in both[namespace] for rule in group["rules"]]:
            selected = re.findall(r"\bmayfly[_:][\w:]+(\{[^}]*\})?", rule["expr"])
            assert selected and all(f'namespace="{namespace}"' in one for one in selected), rule
    apart = [{**group, "name": f"{namespace}.{group['name']}"} for namespace in both for group in both[namespace]]
    files = [written({"groups": apart})]

    def fires(alert, namespace, severity, summary):
        annotations = next(rule["annotations"] for group in both["apps"] for rule in group["rules"] if rule.get("alert") == alert)
        return {"exp_labels": {"severity": severity, "namespace": namespace}, "exp_annotations": {**annotations, "summary": summary}}

    up = "mayfly_dispatcher_broker_up"
    gone = {"series": up + '{namespace="apps"}', "values": "1x4 stale"}
    here = {"series": up + '{namespace="apps"}', "values": "1x40"}
    there = {"series": up + '{namespace="other"}', "values": "1x40"}
    reconciles = [{"series": f'mayfly_dispatcher_reconciler{{namespace="{one}"}}', "values": "0x40" if one == "apps" else "1x40"} for one in both]
    none = {"eval_time": "5m", "alertname": "MayflyNoDispatcher"}
    nobody = {"eval_time": "5m", "alertname": "MayflyNobodyReconciles"}
    missing = fires("MayflyNoDispatcher", "apps", "critical", "Prometheus sees no dispatcher of Mayfly (apps)")
    idle = fires("MayflyNobodyReconciles", "apps", "critical", "No dispatcher (apps) reconciles")
    cases = [
        ([gone, there], {**none, "exp_alerts": [missing]}),
        ([here, there], none),
        # This would fire twice if each release looked at all namespaces.
        ([here, there, *reconciles], {**nobody, "exp_alerts": [idle]}),
    ]
    tests = [{"interval": "30s", "input_series": series, "alert_rule_test": [case]} for series, case in cases]
    must(run(promtool, "test", "rules", written({"rule_files": files, "tests": tests})), "rules of two releases")


def dashboards_are_good():
    def shipped(name, *more):
        rendered = objects(template(f"{CHART}/ci/{name}-values.yaml", "--set", "metrics.dashboards.enabled=true", *more))
        (boards,) = [one["data"] for one in rendered if one["kind"] == "ConfigMap" and "dashboards" in one["metadata"]["name"]]
        return {key: json.loads(text) for key, text in boards.items()}

    full = shipped("full")
    assert sorted(full) == ["apps.mf-creds-engines.json", "apps.mf-creds.json"]
    assert list(shipped("engines-only")) == ["apps.mf-mayfly-engines.json"]
    assert list(shipped("dispatcher-only")) == ["apps.mf-mayfly.json"]
    # Side by side in one Grafana.
    others = [shipped("full", "--namespace", "other"), shipped("full", "--set", "fullnameOverride=two"), shipped("names")]
    for what in (lambda key, board: key, lambda key, board: board["uid"], lambda key, board: board["title"]):
        said = [what(key, board) for boards in (full, *others) for key, board in boards.items()]
        assert len(set(said)) == len(said) and all(said), said

    selector = re.compile(r"\b((?:mayfly|process)_\w+)(\{.*?\})?")
    for key, board in full.items():
        # The files can also be imported by hand: they contain no placeholders.
        file = json.load(open(f"{CHART}/files/dashboards/{'engines' if key.endswith('-engines.json') else 'mayfly'}.json"))
        assert board["panels"] == file["panels"], f"{key}: the chart ships other panels"
        assert len(board["uid"]) <= 40 and all(panel["targets"] for panel in board["panels"]), key
        assert "__" not in json.dumps(board).replace("__rate_interval", "").replace("__all", ""), key
        variables = {one["name"]: one for one in board["templating"]["list"]}
        assert variables["namespace"]["current"]["value"] == ["apps"] and variables["namespace"]["allValue"] == ".*"
        engines = key.endswith("-engines.json")
        assert engines == ("group" in variables) and "pool" in variables, key
        # "All" means all groups, not processes without a group, such as a dispatcher.
        assert not engines or variables["group"]["allValue"] == ".+"
        for panel in board["panels"]:
            for target in panel["targets"]:
                asked = selector.findall(target["expr"].replace("mayfly_group=", "group="))
                assert asked, target
                for metric, labels in asked:
                    assert 'namespace=~"$namespace"' in labels, f"{key}: {panel['title']}: {metric} of all namespaces"
                    if engines and metric.startswith("mayfly_dispatcher"):
                        assert "of the pool" in panel["title"] and 'pool=~"$pool"' in labels, f"{key}: {panel['title']}"
                    elif engines:
                        assert "the pool" not in panel["title"] and 'group=~"$group"' in labels, f"{key}: {panel['title']}"
    monitors = [one["spec"] for one in objects(template(f"{CHART}/ci/full-values.yaml")) if one["kind"] == "PodMonitor"]
    assert monitors and all(monitor["podTargetLabels"] == ["mayfly/group"] for monitor in monitors)


def figures_have_their_colours():
    """Without thresholds Grafana shows values in green, and from 80 on in red."""
    good, bad, neutral = {"green"}, {"red", "orange", "yellow"}, {"blue"}
    # By the panel's title: the colours of 0, 1 and 80.
    meant = {
        "Overdue leases": (good, bad, bad), "Stuck leases": (good, bad, bad), "Pools without engines": (good, bad, bad),
        "Skipped grants": (good, bad, bad), "Dispatchers": (bad, good, good), "Engines": (bad, good, good),
        "Broker": (bad, good, good), "Store": (bad, good, good), "Reconcilers": (bad, good, good),
        "Active leases": (neutral,) * 3, "Active leases of the pool": (neutral,) * 3, "Tasks in flight": (neutral,) * 3,
    }
    seen = set()
    for file in glob(f"{CHART}/files/dashboards/*.json"):
        for panel in json.load(open(file))["panels"]:
            if panel["type"] not in ("stat", "gauge"):
                continue
            defaults = panel["fieldConfig"]["defaults"]
            assert defaults["color"] == {"mode": "thresholds"} and defaults["thresholds"]["mode"] == "absolute", panel["title"]
            steps = defaults["thresholds"]["steps"]
            for value, colours in zip((0, 1, 80), meant[panel["title"]]):
                colour = [step["color"] for step in steps if step["value"] is None or step["value"] <= value][-1]
                assert colour in colours, f"{file}: {panel['title']}: {value} is {colour}"
            seen.add(panel["title"])
    assert seen == set(meant), seen ^ set(meant)
    return f"{len(seen)} panels"
