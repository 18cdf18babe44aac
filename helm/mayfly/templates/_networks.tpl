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
