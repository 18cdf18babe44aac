# Uses the snippet for Rails: active_record.rb DATABASE.YML. Prints the accounts that it has seen.
require "active_record"
require "set"
require "yaml"

accounts = Integer(ENV.fetch("ACCOUNTS"))
stop = Process.clock_gettime(Process::CLOCK_MONOTONIC) + Integer(ENV.fetch("SECONDS"))
ActiveRecord::Base.establish_connection(YAML.load_file(ARGV.fetch(0)).fetch("production"))
pool = ActiveRecord::Base.connection_pool
seen = Set.new
while seen.size < accounts && Process.clock_gettime(Process::CLOCK_MONOTONIC) < stop
  # Rails does this for each request.
  seen << pool.with_connection { |connection| connection.select_value("SELECT current_user") }
  sleep 0.1
end
puts seen.to_a.join(" ")
exit seen.size >= accounts
