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

{{/* dict "values" (the component's). A probe by HTTPS accepts any certificate. */}}
{{- define "mayfly.probes" -}}
{{- $scheme := ternary "HTTPS" "HTTP" (not (not .values.tlsSecret)) -}}
startupProbe:
  httpGet: {path: /healthz, port: admin, scheme: {{ $scheme }}}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  httpGet: {path: /healthz, port: admin, scheme: {{ $scheme }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet: {path: /readyz, port: admin, scheme: {{ $scheme }}}
  periodSeconds: 3
  timeoutSeconds: 3
  failureThreshold: 2
{{- end -}}

{{/* A volume with a certificate and its key: dict "name" its "secret" its */}}
{{- define "mayfly.pair" -}}
- name: {{ .name }}
  secret:
    secretName: {{ .secret | quote }}
    defaultMode: 0440
    items:
      - {key: tls.crt, path: tls.crt}
      - {key: tls.key, path: tls.key}
{{- end -}}

{{/* Volumes and mounts of every process: dict "root" $ "values" (the component's) */}}
{{- define "mayfly.volumes" -}}
{{- $amqp := dict "root" .root "own" .values.amqp -}}
- name: amqp
  secret:
    secretName: {{ include "mayfly.amqp.secret" $amqp | quote }}
    defaultMode: 0440
    items:
      - {key: {{ include "mayfly.amqp.key" $amqp | quote }}, path: url}
# The root file system is read-only.
- name: tmp
  emptyDir: {}
{{- with .root.Values.amqp.caSecret }}
- name: amqp-ca
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0444
{{- end }}
{{- with include "mayfly.amqp.clientCert" $amqp }}
{{ include "mayfly.pair" (dict "name" "amqp-client" "secret" .) }}
{{- end }}
{{- with .values.tlsSecret }}
{{ include "mayfly.pair" (dict "name" "tls" "secret" .) }}
{{- end }}
{{- end -}}

{{/* dict "root" $ "values" (the component's) */}}
{{- define "mayfly.mounts" -}}
- {name: amqp, mountPath: /etc/mayfly/amqp, readOnly: true}
- {name: tmp, mountPath: /tmp}
{{- if .root.Values.amqp.caSecret }}
- {name: amqp-ca, mountPath: /etc/mayfly/amqp-ca, readOnly: true}
{{- end }}
{{- if include "mayfly.amqp.clientCert" (dict "root" .root "own" .values.amqp) }}
- {name: amqp-client, mountPath: /etc/mayfly/amqp-client, readOnly: true}
{{- end }}
{{- if .values.tlsSecret }}
- {name: tls, mountPath: /etc/mayfly/tls, readOnly: true}
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
{{ include "mayfly.store.volumes" . }}
{{- end }}
{{ include "mayfly.volumes" (dict "root" . "values" $d) }}
{{- with $d.clientCaSecret }}
- name: clients
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0444
{{- end }}
{{- with $d.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* The URL of a store in PostgreSQL. */}}
{{- define "mayfly.store.volumes" -}}
{{- $s := .Values.dispatcher.store -}}
{{- if $s.existingSecret -}}
- name: store
  secret:
    secretName: {{ $s.existingSecret | quote }}
    defaultMode: 0440
    items:
      - {key: {{ $s.existingSecretKey | quote }}, path: url}
{{- with $s.caSecret }}
- name: store-ca
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0444
{{- end }}
{{- end -}}
{{- end -}}

{{/* dict "root" $ "values" (the group's) */}}
{{- define "mayfly.engine.volumes" -}}
- name: pool
  secret:
    secretName: {{ .values.existingSecret | quote }}
    defaultMode: 0440
    items:
      - {key: {{ .values.existingSecretKey | quote }}, path: key}
{{ include "mayfly.volumes" . }}
{{- with .values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* A hash of the Secrets in a pod's volumes, so that an upgrade replaces the pod when a Secret has changed:
dict "root" $ "volumes" (as YAML). All Secrets go into one hash. The first item of the first volume is a key of
32 random bytes; without it there is no hash, because it could reveal a password. If Secrets cannot be looked up,
as in `helm template` or without lookup.enabled, the hash is always the same. */}}
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

{{/* What all pods have: dict "root" $ "account" (name of the ServiceAccount) "values" (the component's)
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
