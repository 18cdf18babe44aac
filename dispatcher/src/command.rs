//! What the flags ask for instead of a run: work on the store, or on the owner of the broker's virtual host.

use mayfly_common::broker::take_over;
use tracing::info;

use crate::settings::{Flags, NO_BROKER, Settings, copy_target};
use crate::store::{self, OpenError};

/// Does what the flags ask for instead of a run. `None`: they ask for a run.
pub(crate) fn act(flags: &Flags, settings: &Settings) -> Option<Result<(), String>> {
    let place = &settings.place;
    if flags.take_over_broker {
        return Some(take_over_broker(settings));
    }
    let done: Result<(), OpenError> = if let Some(file) = &flags.backup {
        store::back_up(place, file, flags.keep.map(usize::from))
    } else if let Some(file) = &flags.restore {
        store::restore(place, file)
    } else if let Some(to) = &flags.copy_store {
        return Some(copy_store(settings, to));
    } else if flags.restored {
        store::mark_restored(place).map(|()| info!("the store is marked as restored"))
    } else if let Some(file) = &flags.new_root_token {
        store::new_root_token(place, file).map(|()| {
            info!(file = %file.display(), "the root token is replaced; the new one is in this file");
        })
    } else if let Some(key) = flags.rekey {
        store::rekey(place, key, flags.finish)
    } else if flags.finish_upgrade {
        store::finish_upgrade(place).map(|was_in_progress| {
            if !was_in_progress {
                info!("no upgrade of this store is in progress");
            }
        })
    } else {
        return None;
    };
    Some(done.map_err(|error| error.to_string()))
}

fn copy_store(settings: &Settings, to: &str) -> Result<(), String> {
    let to = copy_target(to, &settings.place.data_dir).map_err(|error| error.to_string())?;
    store::copy_store(&settings.place, &to).map_err(|error| error.to_string())
}

/// Makes the broker's virtual host belong to this installation.
fn take_over_broker(settings: &Settings) -> Result<(), String> {
    let ours = store::installation(&settings.place).map_err(|error| error.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| error.to_string())?;
    let login = settings.login.as_ref().ok_or(NO_BROKER)?;
    let taking = take_over(login, &ours);
    let was_another_s = runtime
        .block_on(taking)
        .map_err(|error| error.to_string())?;
    match was_another_s {
        true => {
            info!(installation = %ours, "the virtual host of the broker now belongs to this installation")
        }
        false => {
            info!(installation = %ours, "the virtual host of the broker already belongs to this installation")
        }
    }
    Ok(())
}
