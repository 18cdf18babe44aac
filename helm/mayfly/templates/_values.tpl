{{/* The names of the groups of engines, as YAML. A group that is null does not exist. */}}
{{- define "mayfly.groups" -}}
{{- $names := list -}}
{{- range $name, $group := .Values.engines -}}
{{- if not (kindIs "invalid" $group) -}}
{{- $names = append $names $name -}}
{{- end -}}
{{- end -}}
{{- toYaml (sortAlpha $names) -}}
{{- end -}}

{{/* Merges two maps key by key, as YAML. `over` wins; null in it removes a key: dict "under" "over" */}}
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

{{/* The values of a group, as YAML: those of engineDefaults, replaced by the group's own, even if these are
empty. Maps are replaced as a whole, except some that are merged key by key. */}}
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
{{- fail "rabbitmqCluster.create: each part needs its own user; name its Secret in dispatcher.amqp.existingSecret and engines.GROUP.amqp.existingSecret (deploy/rabbitmq/users.sh makes the users)" -}}
{{- end -}}
{{- $name = default .root.Values.amqp.existingSecret $name -}}
{{- if not $name -}}
{{- fail "amqp.existingSecret: name the Secret with RabbitMQ's URL, or make a cluster with rabbitmqCluster.create" -}}
{{- end -}}
{{- if eq $name (printf "%s-rabbitmq-default-user" (include "mayfly.fullname" .root)) -}}
{{- fail (printf "amqp.existingSecret: %s has RabbitMQ's administrator; no part of Mayfly needs its rights" $name) -}}
{{- end -}}
{{ $name }}
{{- end -}}

{{/* The secret with the certificate to show to RabbitMQ; may be empty: dict "root" $ "own" (the component's amqp values) */}}
{{- define "mayfly.amqp.clientCert" -}}
{{- default .root.Values.amqp.clientCertSecret .own.clientCertSecret -}}
{{- end -}}

{{/* Where the API is, as pods of the release's namespace reach it. */}}
{{- define "mayfly.dispatcher.address" -}}
{{- $name := printf "%s-dispatcher" (include "mayfly.fullname" .) -}}
{{- $port := int64 .Values.dispatcher.service.port -}}
{{- if .Values.dispatcher.tlsSecret -}}
{{- printf "https://%s.%s.svc:%d" $name .Release.Namespace $port -}}
{{- else -}}
{{- printf "http://%s:%d" $name $port -}}
{{- end -}}
{{- end -}}

{{- define "mayfly.amqp.key" -}}
{{- if .own.existingSecret -}}
{{ .own.existingSecretKey }}
{{- else -}}
{{ .root.Values.amqp.existingSecretKey }}
{{- end -}}
{{- end -}}

{{/* Fails if two entries have the same name, which the API server would refuse:
dict "all" (a list of volumes or containers) "at" (the value that adds them) */}}
{{- define "mayfly.distinct" -}}
{{- $seen := dict -}}
{{- range .all -}}
{{- if hasKey $seen .name -}}
{{- fail (printf "%s: %s exists already; choose another name" $.at .name) -}}
{{- end -}}
{{- $_ := set $seen .name true -}}
{{- end -}}
{{- end -}}

{{/* The service account: dict "values" (the component's) "name" (of the Deployment) */}}
{{- define "mayfly.account" -}}
{{- default .name .values.serviceAccount.name -}}
{{- end -}}
