{{- define "mayfly.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "mayfly.longname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains (include "mayfly.name" .) .Release.Name -}}
{{- .Release.Name -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "mayfly.name" .) -}}
{{- end -}}
{{- end -}}

{{/* At most 40 characters. A longer name ends in its hash, so that two of the same beginning differ. */}}
{{- define "mayfly.fullname" -}}
{{- $name := include "mayfly.longname" . -}}
{{- if gt (len $name) 40 -}}
{{- $name = printf "%s-%s" (trunc 31 $name | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* The names of the groups of engines, as YAML. A group that is null is none. */}}
{{- define "mayfly.groups" -}}
{{- $names := list -}}
{{- range $name, $group := .Values.engines -}}
{{- if not (kindIs "invalid" $group) -}}
{{- $names = append $names $name -}}
{{- end -}}
{{- end -}}
{{- toYaml (sortAlpha $names) -}}
{{- end -}}

{{/* Whether the cluster is OpenShift; empty: no. */}}
{{- define "mayfly.openshift" -}}
{{- if or (.Capabilities.APIVersions.Has "security.openshift.io/v1") (.Capabilities.APIVersions.Has "route.openshift.io/v1") -}}
yes
{{- end -}}
{{- end -}}

{{/* The metadata of an object: dict "root" $ "name" its "labels" its (as YAML) "annotations" its */}}
{{- define "mayfly.metadata" -}}
name: {{ .name | quote }}
labels:
  {{- .labels | nindent 2 }}
{{- with merge (dict) (default dict .annotations) .root.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What pods are selected by; never changes, or an upgrade would be refused. */}}
{{- define "mayfly.selector" -}}
app.kubernetes.io/name: {{ include "mayfly.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "mayfly.labels" -}}
{{- include "mayfly.labelsAnd" (dict "root" . "labels" dict) -}}
{{- end -}}

{{/* And those of one object: dict "root" $ "labels" them */}}
{{- define "mayfly.labelsAnd" -}}
{{ include "mayfly.selector" .root }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service | quote }}
app.kubernetes.io/part-of: mayfly
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | quote }}
{{- with merge (dict) .labels .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "mayfly.dispatcher.selector" -}}
{{ include "mayfly.selector" . }}
app.kubernetes.io/component: dispatcher
{{- end -}}

{{- define "mayfly.dispatcher.labels" -}}
{{ include "mayfly.dispatcher.labelsAnd" (dict "root" . "labels" dict) }}
{{- end -}}

{{- define "mayfly.dispatcher.labelsAnd" -}}
{{ include "mayfly.labelsAnd" . }}
app.kubernetes.io/component: dispatcher
{{- end -}}

{{/* With the root and the group's name: dict "root" $ "group" name */}}
{{- define "mayfly.engine.selector" -}}
{{ include "mayfly.selector" .root }}
app.kubernetes.io/component: engine
mayfly/group: {{ .group | quote }}
{{- end -}}

{{- define "mayfly.engine.labels" -}}
{{ include "mayfly.engine.labelsAnd" (dict "root" .root "group" .group "labels" dict) }}
{{- end -}}

{{- define "mayfly.engine.labelsAnd" -}}
{{ include "mayfly.labelsAnd" . }}
app.kubernetes.io/component: engine
mayfly/group: {{ .group | quote }}
{{- end -}}

{{- define "mayfly.engine.fullname" -}}
{{ include "mayfly.fullname" .root }}-engine-{{ .group }}
{{- end -}}

{{/* KEDA takes names of 54 characters at most. */}}
{{- define "mayfly.engine.scaler" -}}
{{- $name := include "mayfly.engine.fullname" . -}}
{{- if gt (len $name) 54 -}}
{{- $name = printf "%s-%s" (trunc 45 $name | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* One map over another key by key, as YAML; a key that is null is taken away: dict "under" "over" */}}
{{- define "mayfly.over" -}}
{{- $values := deepCopy .under -}}
{{- range $key, $value := .over -}}
{{- if kindIs "invalid" $value -}}
{{- $_ := unset $values $key -}}
{{- else -}}
{{- $_ := set $values $key $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $values -}}
{{- end -}}

{{/* A group's values in place of those of all groups, as YAML. What a group says counts, also what is
empty; some values are made of several, each of which it may say. */}}
{{- define "mayfly.engine.values" -}}
{{- $values := deepCopy .root.Values.engineDefaults -}}
{{- range $key, $value := index .root.Values.engines .group -}}
{{- if eq $key "resources" -}}
{{- range $part, $value := $value -}}
{{- $both := dict "under" (default dict (index $values.resources $part)) "over" (default dict $value) -}}
{{- $_ := set $values.resources $part (fromYaml (include "mayfly.over" $both)) -}}
{{- end -}}
{{- else if has $key (list "amqp" "networkPolicy" "scaling" "serviceAccount" "podSecurityContext" "containerSecurityContext") -}}
{{- range $part, $value := $value -}}
{{- $_ := set (index $values $key) $part $value -}}
{{- end -}}
{{- else -}}
{{- $_ := set $values $key $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $values -}}
{{- end -}}

{{/* dict "root" $ "values" (those with image, imageTag and imageDigest) */}}
{{- define "mayfly.image" -}}
{{- with .root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- .values.image -}}
{{- with .values.imageDigest -}}
@{{ . }}
{{- else -}}
:{{ coalesce .values.imageTag .root.Values.image.tag .root.Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* The secret with the AMQP URL: dict "root" $ "own" (the component's amqp values) */}}
{{- define "mayfly.amqp.secret" -}}
{{- $name := .own.existingSecret -}}
{{- if and (not $name) .root.Values.rabbitmqCluster.create -}}
{{- fail "rabbitmqCluster.create: each part needs a user of its own; name its secret with dispatcher.amqp.existingSecret and engines.GROUP.amqp.existingSecret (deploy/rabbitmq/users.sh makes the users)" -}}
{{- end -}}
{{- $name = default .root.Values.amqp.existingSecret $name -}}
{{- if not $name -}}
{{- fail "amqp.existingSecret: name the secret with RabbitMQ's URL, or let rabbitmqCluster.create make a cluster" -}}
{{- end -}}
{{- if eq $name (printf "%s-rabbitmq-default-user" (include "mayfly.fullname" .root)) -}}
{{- fail (printf "amqp.existingSecret: %s is RabbitMQ's administrator; no part needs that" $name) -}}
{{- end -}}
{{ $name }}
{{- end -}}

{{- define "mayfly.amqp.key" -}}
{{- if .own.existingSecret -}}
{{ .own.existingSecretKey }}
{{- else -}}
{{ .root.Values.amqp.existingSecretKey }}
{{- end -}}
{{- end -}}

{{/* The security context of a pod: dict "root" $ "own" (keys of the component) */}}
{{- define "mayfly.podSecurity" -}}
{{- $context := fromYaml (include "mayfly.over" (dict "under" .root.Values.podSecurityContext "over" .own)) -}}
{{- $adapt := .root.Values.openshift.adaptSecurityContext -}}
{{- if or (eq $adapt "force") (and (eq $adapt "auto") (include "mayfly.openshift" .root)) -}}
{{- $context = omit $context "runAsUser" "runAsGroup" "fsGroup" -}}
{{- end -}}
{{- toYaml $context -}}
{{- end -}}

{{- define "mayfly.containerSecurity" -}}
{{- include "mayfly.over" (dict "under" .root.Values.containerSecurityContext "over" .own) -}}
{{- end -}}

{{/* The address a program listens on, at a port: dict "root" $ "port" 8470 */}}
{{- define "mayfly.listen" -}}
{{- $families := .root.Values.dispatcher.service.ipFamilies -}}
{{- $only4 := and $families (not (has "IPv6" $families)) -}}
{{- $address := default (ternary "0.0.0.0" "::" (not (not $only4))) (trimPrefix "[" .root.Values.listenAddress | trimSuffix "]") -}}
{{- if contains ":" $address -}}
{{- $address = printf "[%s]" $address -}}
{{- end -}}
{{- printf "%s:%d" $address (int64 .port) -}}
{{- end -}}

{{/* Environment variables, as YAML; those of a name that the user names are the user's:
dict "chart" (as YAML) "extra" (a list) */}}
{{- define "mayfly.environment" -}}
{{- $extra := dict -}}
{{- range .extra -}}
{{- $_ := set $extra .name . -}}
{{- end -}}
{{- $all := list -}}
{{- range fromYamlArray .chart -}}
{{- if not (hasKey $extra .name) -}}
{{- $all = append $all . -}}
{{- end -}}
{{- end -}}
{{- range .extra -}}
{{- if hasKey $extra .name -}}
{{- $all = append $all (get $extra .name) -}}
{{- $_ := unset $extra .name -}}
{{- end -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{/* What every process gets, as environment: dict "root" $ */}}
{{- define "mayfly.env" -}}
- name: MAYFLY__AMQP__URL_FILE
  value: /etc/mayfly/amqp/url
- name: MAYFLY__LOG__LEVEL
  value: {{ .root.Values.log.level | quote }}
- name: MAYFLY__LOG__FORMAT
  value: {{ .root.Values.log.format | quote }}
{{- with .root.Values.traces.endpoint }}
- name: MAYFLY__TRACES__ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- if .root.Values.amqp.caSecret }}
- name: SSL_CERT_FILE
  value: /etc/mayfly/amqp-ca/ca.crt
{{- end }}
{{- end -}}

{{- define "mayfly.dispatcher.env" -}}
{{- $d := .Values.dispatcher -}}
{{ include "mayfly.env" (dict "root" .) }}
- name: MAYFLY__HTTP__LISTEN
  value: {{ include "mayfly.listen" (dict "root" . "port" 8470) | quote }}
- name: MAYFLY__ADMIN__LISTEN
  value: {{ include "mayfly.listen" (dict "root" . "port" 8471) | quote }}
- name: MAYFLY__DATA_DIR
  value: /var/lib/mayfly
{{- if not (eq $d.store.type "sqlite") }}
- name: MAYFLY__STORE__URL_FILE
  value: /etc/mayfly/store/url
{{- end }}
- name: MAYFLY__SEAL__KEY_FILE
  value: /etc/mayfly/keys/master-key
- name: MAYFLY__INIT__ROOT_TOKEN_FILE
  value: /etc/mayfly/keys/root-token
- name: MAYFLY__CREATE__DEADLINE_SECONDS
  value: {{ $d.createDeadlineSeconds | quote }}
- name: MAYFLY__LEASE__MAX_TTL_SECONDS
  value: {{ int64 $d.maxTtlSeconds | quote }}
- name: MAYFLY__LEASE__SWEEP_SECONDS
  value: {{ int64 $d.sweepSeconds | quote }}
- name: MAYFLY__LEASE__SWEEP_GRACE_SECONDS
  value: {{ int64 $d.sweepGraceSeconds | quote }}
{{- end -}}

{{/* dict "root" $ "values" (the group's) */}}
{{- define "mayfly.engine.env" -}}
{{ include "mayfly.env" . }}
- name: MAYFLY__ADMIN__LISTEN
  value: {{ include "mayfly.listen" (dict "root" .root "port" 8472) | quote }}
- name: MAYFLY__POOL__NAME
  value: {{ .values.pool | quote }}
- name: MAYFLY__POOL__KEY_FILE
  value: /etc/mayfly/pool/key
- name: MAYFLY__ENGINE__NAME
  valueFrom:
    fieldRef: {fieldPath: metadata.name}
{{- end -}}

{{- define "mayfly.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: admin}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: admin}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: admin}
  periodSeconds: 3
  timeoutSeconds: 3
  failureThreshold: 2
{{- end -}}

{{/* Volumes and mounts of the AMQP secret: dict "root" $ "own" (the component's amqp values) */}}
{{- define "mayfly.amqp.volumes" -}}
- name: amqp
  secret:
    secretName: {{ include "mayfly.amqp.secret" . | quote }}
    defaultMode: 0440
    items:
      - {key: {{ include "mayfly.amqp.key" . | quote }}, path: url}
{{- with .root.Values.amqp.caSecret }}
- name: amqp-ca
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0444
{{- end }}
{{- end -}}

{{- define "mayfly.amqp.mounts" -}}
- {name: amqp, mountPath: /etc/mayfly/amqp, readOnly: true}
{{- if .root.Values.amqp.caSecret }}
- {name: amqp-ca, mountPath: /etc/mayfly/amqp-ca, readOnly: true}
{{- end }}
{{- end -}}

{{- define "mayfly.dispatcher.volumes" -}}
{{- $d := .Values.dispatcher -}}
- name: keys
  secret:
    secretName: {{ $d.existingSecret | quote }}
    defaultMode: 0440
    items:
      - {key: master-key, path: master-key}
      - {key: root-token, path: root-token}
- name: data
  {{- if eq $d.store.type "sqlite" }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-dispatcher" (include "mayfly.fullname" .)) $d.persistence.existingClaim | quote }}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- if eq $d.store.type "postgresql" }}
- name: store
  secret:
    secretName: {{ $d.store.existingSecret | quote }}
    defaultMode: 0440
    items:
      - {key: {{ $d.store.existingSecretKey | quote }}, path: url}
{{- with $d.store.caSecret }}
- name: store-ca
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0444
{{- end }}
{{- end }}
- name: tmp
  emptyDir: {}
{{ include "mayfly.amqp.volumes" (dict "root" . "own" $d.amqp) }}
{{- with $d.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* dict "root" $ "values" (the group's) */}}
{{- define "mayfly.engine.volumes" -}}
- name: pool
  secret:
    secretName: {{ .values.existingSecret | quote }}
    defaultMode: 0440
    items:
      - {key: {{ .values.existingSecretKey | quote }}, path: key}
{{ include "mayfly.amqp.volumes" (dict "root" .root "own" .values.amqp) }}
{{- with .values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The sum of what the Secrets of a pod's volumes hold, so that an upgrade replaces the pod when one has
changed: dict "root" $ "volumes" (as YAML). It goes over all of them together, and the first item of the first volume
is a key of 32 random bytes: without it there is no sum, as it would tell of a password. Where nothing is to be
looked up, as in `helm template` or without lookup.enabled, it is always the same. */}}
{{- define "mayfly.secretsSum" -}}
{{- $volumes := fromYamlArray .volumes -}}
{{- $held := list -}}
{{- range $volumes -}}
{{- with .secret -}}
{{- if $.root.Values.lookup.enabled -}}
{{- $held = append $held (lookup "v1" "Secret" $.root.Release.Namespace .secretName).data -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $key := (first (first $volumes).secret.items).key -}}
{{- if not (get (default dict (first $held)) $key) -}}
{{- $held = list -}}
{{- end -}}
{{- toJson $held | sha256sum -}}
{{- end -}}

{{/* What all pods say: dict "root" $ "account" (name of the service account) "values" (the component's)
"selector" (its selector, as YAML) */}}
{{- define "mayfly.pod" -}}
serviceAccountName: {{ .account | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with include "mayfly.podSecurity" (dict "root" .root "own" .values.podSecurityContext) }}
securityContext:
  {{- . | nindent 2 }}
{{- end }}
{{- include "mayfly.pullSecrets" .root }}
{{- with .values.hostAliases }}
hostAliases:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.dnsPolicy }}
dnsPolicy: {{ . | quote }}
{{- end }}
{{- with .values.dnsConfig }}
dnsConfig:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- include "mayfly.placement" (dict "values" .values "selector" .selector) }}
{{- with .values.initContainers }}
initContainers:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "mayfly.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* The service account: dict "values" (the component's) "name" (of the Deployment) */}}
{{- define "mayfly.account" -}}
{{- default .name .values.serviceAccount.name -}}
{{- end -}}

{{/* Where pods go: dict "values" (the component's) "selector" (its selector, as YAML) */}}
{{- define "mayfly.placement" -}}
{{- with .values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
affinity:
  {{- if .values.affinity }}
  {{- toYaml .values.affinity | nindent 2 }}
  {{- else }}
  podAntiAffinity:
    preferredDuringSchedulingIgnoredDuringExecution:
      - weight: 100
        podAffinityTerm:
          topologyKey: kubernetes.io/hostname
          labelSelector:
            matchLabels:
              {{- .selector | nindent 14 }}
  {{- end }}
{{- end -}}

{{/* Egress to names, the broker and the collector of traces. */}}
{{- define "mayfly.egress" -}}
- ports:
    {{- range (default (ternary (list 53 5353) (list 53) (eq (include "mayfly.openshift" .) "yes")) .Values.networkPolicy.dnsPorts) }}
    - {port: {{ int64 . }}, protocol: UDP}
    - {port: {{ int64 . }}, protocol: TCP}
    {{- end }}
- ports:
    {{- range .Values.networkPolicy.amqpPorts }}
    - {port: {{ . }}, protocol: TCP}
    {{- end }}
  {{- with .Values.networkPolicy.amqpTo }}
  to:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- if .Values.traces.endpoint }}
- ports:
    {{- $url := urlParse .Values.traces.endpoint }}
    {{- $named := regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) }}
    - {port: {{ coalesce .Values.networkPolicy.tracesPort $named (ternary 443 80 (eq $url.scheme "https")) }}, protocol: TCP}
{{- end }}
{{- with .Values.networkPolicy.extraEgress }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* An expression of the rules, of the release's namespace alone: dict "root" $ "expr" it */}}
{{- define "mayfly.expression" -}}
{{- $here := printf "{namespace=%q}" .root.Release.Namespace -}}
{{- regexReplaceAll "\\b(mayfly[_:][a-zA-Z0-9_:]+)" .expr (printf "${1}%s" $here) | replace "}{" "," -}}
{{- end -}}

{{/* A dashboard under a key, a title and a uid (of 40 characters at most) that no other release's has, for
this release's namespace: dict "root" $ "suffix" (of the key) "board" (its JSON) */}}
{{- define "mayfly.dashboard" -}}
{{- $namespace := .root.Release.Namespace -}}
{{- $name := include "mayfly.fullname" .root -}}
{{- $key := printf "%s.%s%s" $namespace $name .suffix -}}
{{- $board := fromJson .board -}}
{{- $_ := set $board "uid" (printf "mayfly-%s" (sha256sum $key | trunc 32)) -}}
{{- $_ := set $board "title" (printf "%s (%s/%s)" $board.title $namespace $name) -}}
{{- range $board.templating.list -}}
{{- if eq .name "namespace" -}}
{{- $_ := set . "current" (dict "text" (list $namespace) "value" (list $namespace)) -}}
{{- end -}}
{{- end -}}
{{ $key }}.json: |-
  {{- toRawJson $board | nindent 2 }}
{{- end -}}

{{- define "mayfly.metricsIngress" -}}
- ports:
    - {port: admin, protocol: TCP}
  from:
    {{- if .Values.networkPolicy.metricsFrom }}
    {{- toYaml .Values.networkPolicy.metricsFrom | nindent 4 }}
    {{- else }}
    - namespaceSelector: {}
    {{- end }}
{{- with .Values.networkPolicy.extraIngress }}
{{ toYaml . }}
{{- end }}
{{- end -}}
