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

{{/* Environment variables, as YAML. A variable of the user replaces the chart's with the same name:
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

{{/* The files of a listener's certificate: dict "section" "HTTP" */}}
{{- define "mayfly.tls.env" -}}
- name: MAYFLY__{{ .section }}__TLS__CERT_FILE
  value: /etc/mayfly/tls/tls.crt
- name: MAYFLY__{{ .section }}__TLS__KEY_FILE
  value: /etc/mayfly/tls/tls.key
{{- end -}}

{{/* What every process gets, as environment: dict "root" $ "values" (the component's) */}}
{{- define "mayfly.env" -}}
- name: MAYFLY__AMQP__URL_FILE
  value: /etc/mayfly/amqp/url
{{- if .root.Values.amqp.caSecret }}
- name: MAYFLY__AMQP__CA_FILE
  value: /etc/mayfly/amqp-ca/ca.crt
{{- end }}
{{- if include "mayfly.amqp.clientCert" (dict "root" .root "own" .values.amqp) }}
- name: MAYFLY__AMQP__CLIENT_CERT_FILE
  value: /etc/mayfly/amqp-client/tls.crt
- name: MAYFLY__AMQP__CLIENT_KEY_FILE
  value: /etc/mayfly/amqp-client/tls.key
{{- end }}
{{- if .root.Values.amqp.allowPlaintext }}
- name: MAYFLY__AMQP__ALLOW_PLAINTEXT
  value: "true"
{{- end }}
{{- if .values.tlsSecret }}
{{ include "mayfly.tls.env" (dict "section" "ADMIN") }}
{{- else }}
# Health and metrics, no secrets. A NetworkPolicy limits who may connect.
- name: MAYFLY__ADMIN__ALLOW_PLAINTEXT
  value: "true"
{{- end }}
- name: MAYFLY__LOG__LEVEL
  value: {{ .root.Values.log.level | quote }}
- name: MAYFLY__LOG__FORMAT
  value: {{ .root.Values.log.format | quote }}
{{- with .root.Values.traces.endpoint }}
- name: MAYFLY__TRACES__ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- end -}}

{{- define "mayfly.dispatcher.env" -}}
{{- $d := .Values.dispatcher -}}
{{ include "mayfly.env" (dict "root" . "values" $d) }}
- name: MAYFLY__HTTP__LISTEN
  value: {{ include "mayfly.listen" (dict "root" . "port" 8470) | quote }}
{{- if $d.tlsSecret }}
{{ include "mayfly.tls.env" (dict "section" "HTTP") }}
{{- if $d.clientCaSecret }}
- name: MAYFLY__HTTP__TLS__CLIENT_CA_FILE
  value: /etc/mayfly/clients/ca.crt
{{- end }}
{{- else }}
- name: MAYFLY__HTTP__ALLOW_PLAINTEXT
  value: "true"
{{- end }}
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
- name: MAYFLY__LEASE__HISTORY_DAYS
  value: {{ int64 $d.historyDays | quote }}
- name: MAYFLY__LEASE__REFRESH_SECONDS
  value: {{ int64 $d.refreshSeconds | quote }}
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
